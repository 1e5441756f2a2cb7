"""Options with which a method does all that it does within a few epochs of four steps."""

SMALL = {
    "simclr": {},
    "supcon": {"projection_hidden": 64, "projection_dim": 16},
    "moco": {"projection_hidden": 64, "projection_dim": 16, "queue_length": 20},
    "instance": {"projection_dim": 16, "negatives": 20},
    "pirl": {"projection_dim": 16, "negatives": 0, "temperature": 0.07},
    "barlow": {"projection_hidden": 64, "projection_dim": 16},
    "vicreg": {"projection_hidden": 64, "projection_dim": 16},
    "swav": {
        **{"projection_hidden": 64, "projection_dim": 16, "prototypes": 8, "local_crops": 2},
        **{"freeze_epochs": 1, "queue_length": 20, "queue_start": 1},
    },
    "byol": {"projection_hidden": 64, "projection_dim": 16, "prediction_hidden": 64},
    "simsiam": {"projection_hidden": 64, "projection_dim": 64, "prediction_hidden": 16},
    "rotation": {"projection_hidden": 64},
    "jigsaw": {"projection_hidden": 64, "projection_dim": 16, "permutations": 4},
    "relative-patch": {"projection_hidden": 64, "projection_dim": 16},
}
