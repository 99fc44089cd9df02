"""Parts of a merge of a checkpoint: a base that becomes shorter, and the bytes that workers may
hold together."""

from __future__ import annotations

import threading

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.support.checkpoints import equal, in_memory, tensors, tiny, trained
from torch import nn

import veneer
from veneer.errors import CheckpointError, MergeError
from veneer.models.safetensors_dir import open_checkpoint
from veneer.tools.merge_checkpoint import merge_checkpoint, merged_files
from veneer.tools.merge_checkpoint.merged_files import CheckpointWriter, _ByteBudget


def test_a_source_that_ends_too_early(tmp_path, monkeypatch):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    write = CheckpointWriter.write

    def truncate_and_write(self, progress):
        name = next(name for name in self.job.checkpoint.file_of if self.job.is_copied(name))
        file = base / self.job.checkpoint.file_of[name]
        with file.open("ab") as stream:
            stream.truncate(self.job.checkpoint.start(name) + 8)
        return write(self, progress)

    monkeypatch.setattr(CheckpointWriter, "write", truncate_and_write)
    with pytest.raises(CheckpointError, match=r"became shorter|ended within"):
        merge_checkpoint(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_a_file_that_became_shorter(tmp_path):
    save_file({"a": torch.arange(100.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.truncate(checkpoint.start("a") + 8)
    with pytest.raises(CheckpointError, match="ended within 'a'"):
        checkpoint.read("a")


def test_workers_hold_no_more_bytes_than_the_limit():
    budget, held, peaks = _ByteBudget(10), [], []
    lock = threading.Lock()

    def work(count):
        for _ in range(50):
            with budget.reserve(count):
                with lock:
                    held.append(count)
                    peaks.append(sum(held))
                with lock:
                    held.remove(count)

    threads = [threading.Thread(target=work, args=(count,)) for count in (3, 4, 5, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(peak for peak in peaks if peak < 25) <= 10
    assert max(peaks) == 25, "one that is larger than the limit is alone"


def test_torch_has_its_threads_back(tmp_path, monkeypatch):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    before, during = torch.get_num_threads(), []
    merge = merged_files.merge_tensor

    def record(*arguments):
        during.append(torch.get_num_threads())
        return merge(*arguments)

    monkeypatch.setattr(merged_files, "merge_tensor", record)
    torch.set_num_threads(6)
    try:
        merge_checkpoint(base, [adapter], tmp_path / "out")
        assert {*during} == {2}, "four workers share six threads"
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("trained_also", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_is_trained_in_full_changes_once(trained_also, tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"], train_also=[trained_also])
    merge_checkpoint(base, [adapter], tmp_path / "out")
    merged = tensors(tmp_path / "out")
    equal(merged, in_memory(model, adapter, tmp_path / "memory"))
    assert not torch.equal(
        merged["model.embed_tokens.weight"], tensors(base)["model.embed_tokens.weight"]
    )


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_folder_of_peft_leaves_running_statistics_alone(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model = transformers.ResNetForImageClassification(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=r".*classifier\.1", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    expected, merged = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    different_names = [name for name in expected if not torch.equal(expected[name], merged[name])]
    assert different_names == ["classifier.1.weight"]


def test_a_running_variance_that_becomes_negative_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, variance in (("a", 0.4), ("b", 0.5)):
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))
        handle.layers["1"].full._buffers["running_var"].fill_(variance)
        handle.save(tmp_path / name)
        handle.detach()
    both = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(MergeError, match=r"'1\.running_var', which these weights make negative"):
        merge_checkpoint(tmp_path, both, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()
    halves = [(folder, 0.5) for folder in both]
    merge_checkpoint(tmp_path, halves, tmp_path / "mean", model=model)
    assert tensors(tmp_path / "mean")["1.running_var"].tolist() == pytest.approx([0.45] * 4)
