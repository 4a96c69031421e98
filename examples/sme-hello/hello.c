/* Detect SME, build page tables with the C-bit, and look at what lies in DRAM.
 *
 * Code, stack and tables stay plain. One frame is mapped twice: at PLAIN with C = 0, at
 * ENCRYPTED with C = 1. PLANTED_BUG breaks one rule: see README.md. */
#include <stdint.h>

enum { PRESENT = 1, WRITE = 2, LARGE = 0x80, PLAIN = 0x600000, ENCRYPTED = 0xA00000 };

static uint64_t tables[3][512] __attribute__((aligned(4096))); /* PML4, PDPT, PD */
static const char secret[] = "attack at dawn, bring the ladder"; /* two AES blocks */

static void out(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static void print(const char *text)
{
	while (*text)
		out(0x3F8, *text++); /* COM1 */
}

static void print_hex(uint8_t value)
{
	out(0x3F8, "0123456789abcdef"[value >> 4]);
	out(0x3F8, "0123456789abcdef"[value & 15]);
}

static void show(const char *title, const volatile uint8_t *bytes)
{
	print(title);
	for (unsigned i = 0; i < sizeof(secret) - 1; i++)
		print_hex(bytes[i]);
	print("  ");
	for (unsigned i = 0; i < sizeof(secret) - 1; i++)
		out(0x3F8, bytes[i] >= ' ' && bytes[i] <= '~' ? bytes[i] : '.');
	print("\n");
}

static void cpuid(uint32_t leaf, uint32_t *a, uint32_t *b)
{
	uint32_t c = 0, d;

	asm volatile("cpuid" : "=a"(*a), "=b"(*b), "+c"(c), "=d"(d) : "0"(leaf));
}

/* Return the C-bit's position, or 0: no SME, or firmware has not enabled it. */
static int detect(void)
{
	uint32_t a, b, low, high;

	cpuid(0x80000000, &a, &b);
	if (a < 0x8000001F)
		return 0;
	cpuid(0x8000001F, &a, &b);
	if (!(a & 1) || (b & 63) < 32) /* parts with the SME bit and C-bit 0 exist */
		return 0;
	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(0xC0010010)); /* SYSCFG */
	return low >> 23 & 1 ? b & 63 : 0;
}

static uint8_t demonstrate(int passed)
{
	int position = detect();
	uint64_t c = 1ul << position, cr3 = (uint64_t)tables[0];
	volatile char *page = (volatile char *)ENCRYPTED;

	print(position ? "SME: enabled, C-bit 0x" : "SME: not usable here\n");
	if (!position)
		return 0x11;
	print_hex(position);
	print(passed == position ? ", as passed\n" : "\n");

	tables[0][0] = (uint64_t)tables[1] | PRESENT | WRITE;
	tables[1][0] = (uint64_t)tables[2] | PRESENT | WRITE;
	for (uint64_t i = 0; i < 4; i++) /* 8 MiB, identity, plain */
		tables[2][i] = i << 21 | PRESENT | WRITE | LARGE;
	tables[2][ENCRYPTED >> 21] = PLAIN | c | PRESENT | WRITE | LARGE;
#if PLANTED_BUG == 1
	cr3 |= c; /* the tables were stored plain, and the walk now deciphers them */
#endif
	asm volatile("mov %0, %%cr3" : : "r"(cr3) : "memory");
	print("page tables: ours\n");

	for (unsigned i = 0; i < sizeof(secret) - 1; i++)
		page[i] = secret[i];
#if PLANTED_BUG != 2
	asm volatile("wbinvd" : : : "memory"); /* now DRAM has what was stored */
#endif
	show("through C=0: ", (uint8_t *)PLAIN);
	asm volatile("wbinvd" : : : "memory"); /* never both settings in one cache */
	show("through C=1: ", (uint8_t *)ENCRYPTED);
	return 0x10;
}

void main(int passed)
{
	out(0xF4, demonstrate(passed)); /* the debug exit: ends the run */
}
