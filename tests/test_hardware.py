"""What the machine is called beside every speed."""

import pytest
import torch

from tokenfusion.hardware import cpu_facts, hardware_name

GENOA = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu avx avx2 avx512f avx512_bf16
bogomips\t: 5192.16

processor\t: 1
cpu family\t: 26
"""


def test_generations_of_one_name_are_told_apart():
    assert cpu_facts(GENOA) == "AMD EPYC (family 25, model 17, AVX-512, bf16)"
    assert cpu_facts(GENOA.replace("25", "23").replace("avx512f avx512_bf16", "")) == "AMD EPYC (family 23, model 17)"


@pytest.mark.parametrize(("text", "found"), [("", ""), ("Processor: x", ""), ("model name: A chip", "A chip")])
def test_what_is_not_said_is_left_out(text, found):
    assert cpu_facts(text) == found


def test_hardware_is_never_without_a_name():
    name, cores = hardware_name(torch.device("cpu")).rsplit(", ", 1)
    assert name
    assert cores.endswith(" cores")
