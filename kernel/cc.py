"""What early boot decided about memory encryption, and who may ask for it.

Source: Linux 6.1.192 arch/x86/coco/core.c; arch/x86/mm/mem_encrypt_identity.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PHYSICAL_MASK_52 = (1 << 52) - 1
"""__PHYSICAL_MASK before a C-bit is taken out of it."""

SEV_STATUS_SEV = 1 << 0
SEV_STATUS_SEV_ES = 1 << 1
SEV_STATUS_SEV_SNP = 1 << 2


class CcAttr(Enum):
    """The questions that `cc_platform_has` answers, Linux's CC_ATTR_*."""

    MEM_ENCRYPT = "some memory is encrypted"
    HOST_MEM_ENCRYPT = "this is a host with SME active"
    GUEST_MEM_ENCRYPT = "this is a guest with SEV"
    GUEST_STATE_ENCRYPT = "this is a guest with SEV-ES"
    GUEST_UNROLL_STRING_IO = "string I/O is unrolled"
    GUEST_SEV_SNP = "this is a guest with SEV-SNP"


@dataclass(frozen=True)
class EncryptionState:
    """The decision, made once by `sme_enable` and passed on.

    Attributes:
        me_mask: sme_me_mask: the C-bit if encryption is active, else 0.
        sev_status: MSR C001_0131 as early boot read it.
    """

    me_mask: int = 0
    sev_status: int = 0

    @property
    def physical_mask(self) -> int:
        """__PHYSICAL_MASK: address bits of an entry, the C-bit taken out."""
        return PHYSICAL_MASK_52 & ~self.me_mask

    @property
    def cc_mask(self) -> int:
        """The bits that say "encrypted" in a protection; AMD's is the C-bit."""
        return self.me_mask

    def with_mask(self, value: int) -> int:
        """Return __sme_pa: a physical address as CR3 and devices name it."""
        return value | self.me_mask


def cc_platform_has(state: EncryptionState, attribute: CcAttr) -> bool:
    """Tell whether the platform has a property of confidential computing.

    Source: Linux 6.1.192 arch/x86/coco/core.c, amd_cc_platform_has().
    """
    status = state.sev_status
    sev = bool(status & SEV_STATUS_SEV)
    sev_es = bool(status & SEV_STATUS_SEV_ES)
    return {
        CcAttr.MEM_ENCRYPT: state.me_mask != 0,
        CcAttr.HOST_MEM_ENCRYPT: state.me_mask != 0 and not sev,
        CcAttr.GUEST_MEM_ENCRYPT: sev,
        CcAttr.GUEST_STATE_ENCRYPT: sev_es,
        CcAttr.GUEST_UNROLL_STRING_IO: sev and not sev_es,
        CcAttr.GUEST_SEV_SNP: bool(status & SEV_STATUS_SEV_SNP),
    }[attribute]
