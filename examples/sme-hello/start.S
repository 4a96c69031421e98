# The loader has entered long mode and set RSP to the top of its stack of 64 KiB. RDI is
# the C-bit's position (`cbit run --pass-cbit`), which is the first argument of main.
	.section .text.start, "ax"
	.globl	_start
_start:
	cld
	call	main
0:	cli
	hlt
	jmp	0b

	.section .note.GNU-stack, "", @progbits
