"""What every launcher needs of the GPU: its kind, the precision of products, and the launch itself.

Launchers reach these functions through this module, so that ahead-of-time compilation and tests
replace ``target`` and ``launch`` for all of them at once.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def target(device):
    """Architecture and number of multiprocessors of a device; the interpreter has few."""
    if device.type == "cpu":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    # Under CUDA gcnArchName is there too, and is the device's name.
    hip = properties.gcnArchName.split(":")[0] if torch.version.hip else None
    arch = hip or f"sm_{properties.major}{properties.minor}"
    return arch, properties.multi_processor_count


def splits_of(programs, col_blocks, slots):
    """Into how many shares the columns are cut so that programs fill the slots, at most twice."""

    def tiles(splits):
        waves = triton.cdiv(programs * splits, slots)
        finish = 4 if splits > 1 else 0
        return waves * (triton.cdiv(col_blocks, splits) + 2) + finish

    return min(range(1, max(1, min(col_blocks, 2 * slots // programs)) + 1), key=tiles)


def precision_of(dtype, arch):
    """How tl.dot multiplies rows of a dtype: float32 as torch's own switch has it."""
    if dtype == torch.float32 and arch.startswith("sm_") and int(arch[3:]) >= 80:
        chosen = torch.backends.cuda.matmul.fp32_precision
        chosen = torch.backends.fp32_precision if chosen == "none" else chosen
        return "tf32" if chosen == "tf32" else "tf32x3"
    return "ieee"


def strided(**matrices):
    """Arguments of a kernel for the matrices of these names: their pointers and strides."""
    arguments = {}
    for name, x in matrices.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_stride_n"], arguments[f"{name}_stride_d"] = x.stride()
    return arguments


def launch(kernel, grid, *, enable_fp_fusion=True, **arguments):
    """Launch a kernel; fusion is named because its default differs between versions of Triton."""
    kernel[grid](**arguments, enable_fp_fusion=enable_fp_fusion)
