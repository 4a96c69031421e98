"""The engine as a witness: what is offered executes, what is withheld does not."""

from __future__ import annotations

import pytest

from cbit.hw.native.engine import CPU_EPYC

unicorn = pytest.importorskip("unicorn")

from unicorn import x86_const  # noqa: E402

CODE, DATA, STACK = 0x1000, 0x2000, 0x3F00
CR4 = 1 << 5 | 3 << 9 | 1 << 16 | 1 << 18 | 1 << 20 | 1 << 21
"""PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE, SMEP, SMAP."""

# Encodings: [APM3] and the manual's volume 4; memory operands are [rsi].
OFFERED = {
    "sse3: addsubps": "f20fd0c1",
    "pclmulqdq": "660f3a44c100",
    "ssse3: pshufb": "660f3800c1",
    "cmpxchg16b": "480fc70e",
    "sse4_1: pblendvb": "660f3810c1",
    "sse4_2: crc32": "f20f38f1c1",
    "movbe": "0f38f006",
    "popcnt": "f30fb8c1",
    "aes: aesenc": "660f38dcc1",
    "xsave": "0fae26",
    "xsave: xgetbv": "0f01d0",
    "rdrand": "0fc7f0",
    "clflush": "0fae3e",
    "clflushopt": "660fae3e",
    "cmov": "0f44c1",
    "bmi1: andn": "c4e270f2c2",
    "bmi1: tzcnt": "f30fbcc1",
    "bmi2: shlx": "c4e271f7c2",
    "bmi2: pdep": "c4e273f5c2",
    "adx: adcx": "660f38f6c1",
    "fsgsbase: rdfsbase": "f3480faec0",
    "smap: stac": "0f01cb",
    "abm: lzcnt": "f30fbdc1",
    "sse4a: insertq": "f20f79c1",
    "sse4a: movntss": "f30f2b06",
    "prefetchw": "0f0d0e",
    "lahf": "9f",
    "rdtscp": "0f01f9",
    "cr8_legacy: lock mov cr0": "f00f20c0",
    "mmxext: pshufw": "0f70c100",
}
WITHHELD = {
    "clwb": "660fae36",
    "invpcid": "660f388206",
    "rdpid": "f30fc7f8",
    "avx: vaddps ymm": "c5fc58c1",
    "avx2: vpaddd": "c5f5fec2",
    "fma: vfmadd132ps": "c4e27198c2",
    "f16c: vcvtph2ps": "c4e27913c1",
    "sha: sha1nexte": "0f38c8c1",
    "clzero": "0f01fc",
    "xsavec": "0fc726",
    "xsaves": "480fc72e",
    "mwaitx: monitorx": "0f01fa",
    "rdpru": "0f01fd",
    "pku: rdpkru": "0f01ee",
    "gfni: gf2p8mulb": "660f38cfc1",
    "invlpgb": "0f01fe",
    "svm: vmrun": "0f01d8",
    "skinit": "0f01de",
}


def executes(code: bytes) -> bool:
    """Run one instruction on the engine's model; tell whether it was not #UD."""
    engine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    engine.ctl_set_cpu_model(CPU_EPYC)
    engine.mem_map(CODE, 0x3000)
    engine.mem_write(CODE, code)
    engine.reg_write(x86_const.UC_X86_REG_RSI, DATA)
    engine.reg_write(x86_const.UC_X86_REG_RSP, STACK)
    engine.reg_write(x86_const.UC_X86_REG_RCX, 0)
    engine.reg_write(x86_const.UC_X86_REG_CR4, CR4)
    try:
        engine.emu_start(CODE, CODE + len(code))
    except unicorn.UcError as error:
        if error.errno != unicorn.UC_ERR_INSN_INVALID:
            raise
        return False
    assert engine.reg_read(x86_const.UC_X86_REG_RIP) == CODE + len(code)
    return True


@pytest.mark.parametrize("name", OFFERED)
def test_what_is_offered_executes(name: str) -> None:
    assert executes(bytes.fromhex(OFFERED[name]))


@pytest.mark.parametrize("name", WITHHELD)
def test_what_is_withheld_is_an_invalid_opcode(name: str) -> None:
    assert not executes(bytes.fromhex(WITHHELD[name]))
