"""Two processes, the model sharded over them by FSDP2: every one has its own rows, the loss is that of all.

torchrun --nproc-per-node 2 examples/two_processes.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fused_rlhf as fr
from fused_rlhf.trainers.model import build


def main(steps: int = 3) -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    model, _ = build(hidden_size=64, num_layers=2)
    model.to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    B, T = 8, 12
    generator = torch.Generator().manual_seed(1)  # the same rows in every process, of which each takes its own
    ids = torch.randint(3, 90, (B, T), generator=generator).to(device)[rank::world]
    advantages = torch.randn(B, generator=generator).to(device)[rank::world]
    for step in range(steps):
        inputs = fr.lm_head.forward(model, ids)  # runs FSDP2's hooks; the head is whole while it is needed
        loss, metrics = fr.linear_policy_loss(
            inputs.hidden[:, :-1],
            inputs.head,
            ids[:, 1:],
            advantages=advantages,
            objective=fr.GRPO(),
            num_sequences=B / world,  # of all processes, over their number: gradients are averaged
            outputs=("entropy",),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack([loss.detach(), metrics["entropy"]])
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}  loss {total[0] / world:.6f}  entropy {total[1] / world:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
