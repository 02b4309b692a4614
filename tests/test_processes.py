"""Threads of Python, forked processes, and distributed training."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import instembed


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2, 4, 64, 64, generator=generator)
    return embeddings, torch.randint(0, 5, (2, 64, 64), generator=generator)


def loss_and_gradient(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings, labels = example(seed)
    embeddings.requires_grad_()
    loss = instembed.discriminative_loss(embeddings, labels)
    return loss.detach(), torch.autograd.grad(loss, embeddings)[0]


def test_several_python_threads(two_threads: None) -> None:
    expected = [loss_and_gradient(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(loss_and_gradient, range(8)), expected, strict=True):
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


class Losses(Dataset):
    """What a worker of a DataLoader computes with the package: all of its ops."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        loss, _ = loss_and_gradient(index)
        embeddings, _ = example(index)
        grouping = instembed.mean_shift(embeddings, 1.0)
        areas = instembed.label_statistics(grouping.labels).areas
        keypoints = torch.arange(2 * 9 * 4 * 2).reshape(2, 9, 4, 2) % 64
        tag_loss = instembed.associative_embedding_loss(embeddings, keypoints, keypoints[..., 0] >= 0)
        read = instembed.gather_at(embeddings, keypoints)
        return torch.stack([loss, areas.sum().float(), tag_loss, read.sum()])


def test_dataloader_workers(two_threads: None) -> None:
    here = torch.stack([Losses()[index] for index in range(6)])  # starts this process's threads first
    loader = DataLoader(Losses(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), here)


def test_bare_fork(two_threads: None) -> None:
    """A child that kept two threads, as os.fork leaves it, must neither hang nor differ."""
    expected = Losses()[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(Losses()[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two gloo processes with half a batch each get the gradient of one process with all of it."""
    script = textwrap.dedent(
        """
        import os, sys, tempfile
        import torch, torch.distributed as dist, torch.multiprocessing as mp
        import instembed

        def model():
            torch.manual_seed(0)
            return torch.nn.Conv2d(3, 4, 3, padding=1)

        def data():
            generator = torch.Generator().manual_seed(1)
            return (torch.randn(4, 3, 16, 16, generator=generator),
                    torch.randint(0, 4, (4, 16, 16), generator=generator))

        def work(rank, store):
            dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
            images, labels = data()
            parallel = torch.nn.parallel.DistributedDataParallel(model())
            half = slice(2 * rank, 2 * rank + 2)
            instembed.DiscriminativeLoss()(parallel(images[half]), labels[half]).backward()
            whole = model()
            instembed.DiscriminativeLoss()(whole(images), labels).backward()
            torch.testing.assert_close(parallel.module.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-6)
            dist.destroy_process_group()

        if __name__ == "__main__":
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(work, (os.path.join(folder, "store"),), nprocs=2)
        """
    )
    path = tmp_path / "train.py"
    path.write_text(script)
    subprocess.run([sys.executable, str(path)], check=True, timeout=300)
