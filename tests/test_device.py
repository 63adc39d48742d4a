"""What a device can do, and what its kernels are chosen by."""

from __future__ import annotations

import pytest
import torch

from rayfed.device import capability, groups_products, multiplies_bfloat16


@pytest.mark.parametrize(("amx", "avx", "able"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_cpu_multiplies_bfloat16_with_either_instruction(monkeypatch, amx, avx, able):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert multiplies_bfloat16("cpu") == able
    names = capability("cpu").split()
    assert ("AMX" in names, "AVX512_BF16" in names) == (amx, avx)
    assert torch.backends.cpu.get_cpu_capability() in names


@pytest.mark.parametrize(("generation", "able"), [(None, True), ((7, 5), False), ((8, 0), True)])
def test_a_gpu_multiplies_bfloat16_by_its_generation_and_one_elsewhere_counts_as_new(monkeypatch, generation, able):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: generation is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: generation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    assert multiplies_bfloat16("cuda") == able
    known = generation and f"Card, compute capability {generation[0]}.{generation[1]}"
    assert capability("cuda") == (known or "cuda")


@pytest.mark.parametrize(("generation", "able"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_products_are_grouped_where_torch_has_one_kernel_for_it(monkeypatch, generation, able):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    assert groups_products(torch.device("cuda")) == able
    assert not groups_products(torch.device("cpu"))
