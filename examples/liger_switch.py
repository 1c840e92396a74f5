"""One of Liger's chunked losses, ours in its place: the same arguments and results, and another import."""

import torch

# from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from fused_rlhf.integrations.liger import LigerFusedLinearDPOLoss


def main() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    pairs, T, H, V = 2, 12, 32, 500
    hidden = torch.randn(2 * pairs, T, H, requires_grad=True)  # chosen, then rejected
    weight = torch.randn(V, H, requires_grad=True)
    ref_hidden, ref_weight = hidden.detach() + 0.1 * torch.randn(2 * pairs, T, H), weight.detach()
    targets = torch.randint(V, (2 * pairs, T))
    targets[:, :4] = -100  # prompts

    loss_function = LigerFusedLinearDPOLoss(beta=0.1)
    loss, (_, _, *_, chosen_rewards, rejected_rewards) = loss_function(
        weight, hidden, targets, ref_input=ref_hidden, ref_weight=ref_weight
    )
    loss.backward()
    print(f"loss {loss:.4f}  rewards {chosen_rewards.mean():+.3f} {rejected_rewards.mean():+.3f}")
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


if __name__ == "__main__":
    main()
