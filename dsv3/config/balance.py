"""How expert load is kept even: V3's bias, and the losses it is compared with."""

from dataclasses import dataclass

from dsv3.config.check import require_choice, require_not_negative, require_positive

BALANCE_METHODS = ("bias", "sequence_loss", "batch_loss", "v2_losses", "none")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Auxiliary-loss-free balancing with its complementary loss (report 2.1.2), or one of the methods before it."""

    method: str = "bias"
    """'bias': V3 (bias update and the complementary sequence-wise loss). 'sequence_loss', 'batch_loss': eq. 17-20 per
    sequence or over the whole batch, without bias (report 4.5.3). 'v2_losses': expert, device and communication
    losses of V2. 'none': nothing."""
    bias_update_speed: float = 1e-3
    """gamma: added to or taken from a router bias after each step (report 4.2)."""
    bias_freeze_tokens: int = 14_300_000_000_000
    """Tokens after which gamma becomes 0 (report 4.2)."""
    sequence_loss_weight: float = 1e-4
    """alpha: weight of the complementary sequence-wise loss under 'bias' (report 4.2)."""
    auxiliary_loss_weight: float = 1e-3
    """Weight of the loss under 'sequence_loss' and 'batch_loss'; V2-Lite's 0.001."""
    expert_loss_weight: float = 0.003
    """alpha_1 under 'v2_losses' (V2 report 2.2.3)."""
    device_loss_weight: float = 0.05
    """alpha_2 under 'v2_losses'."""
    communication_loss_weight: float = 0.02
    """alpha_3 under 'v2_losses'."""

    def __post_init__(self) -> None:
        require_choice(self, "method", choices=BALANCE_METHODS)
        require_not_negative(
            self,
            "bias_update_speed",
            "sequence_loss_weight",
            "auxiliary_loss_weight",
            "expert_loss_weight",
            "device_loss_weight",
            "communication_loss_weight",
        )
        require_positive(self, "bias_freeze_tokens")
