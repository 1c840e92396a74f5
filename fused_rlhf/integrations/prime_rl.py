"""prime-rl's log-probs and entropies of its injected head: put the class in the place of its own,

    import prime_rl.trainer.models.layers.lm_head as theirs
    from fused_rlhf.integrations.prime_rl import SequenceLogProbEntropy

    theirs._SequenceChunkedLogProbEntropyFn = SequenceLogProbEntropy

before training begins, with `fused_lm_head_token_chunk_size` set to any number, which changes nothing then. The head looks
it up there at each call. Nothing here imports prime-rl.
"""

from __future__ import annotations

from torch import Tensor

from fused_rlhf import notices
from fused_rlhf.functional import linear_logprobs
from fused_rlhf.op.head import Head


class SequenceLogProbEntropy:
    """Called as an autograd function is, by `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of z = hidden @ weight.T * inv_temperature.

        Args:
            hidden: (N, H). weight: (V, H). labels: (N,) integers. inv_temperature: (N,), positive.
            chunk_size: changes nothing: no logits are held whatever the length.

        Returns:
            logprobs and entropy, (N,) fp32; both differentiable in hidden and weight, where prime-rl's entropy is not.

        Raises:
            ValueError, TypeError: as `linear_logprobs`.
        """
        notices.runs("prime-rl's log-probs", hidden, Head(weight), "auto", "no logits whatever the chunk size is")
        temperature = inv_temperature.detach().float().reciprocal()
        found = linear_logprobs(hidden, weight, labels.long(), temperature=temperature, outputs=("entropy",))
        assert found.entropy is not None
        return found.logprobs, found.entropy
