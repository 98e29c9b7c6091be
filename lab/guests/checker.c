/*
 * Writes numbered records to a disk, reads them back, and reports errors and delays on stdout: the
 * part of lab/guests/tiny.py that finds lost, torn and misdirected writes.
 *
 *	checker [-b] [-f] [-n WRITES] [-r RATE] DEVICE NEAR NEAR_STEP FAR FAR_STEP
 *	checker fill OFFSET LENGTH
 *
 * There are 64 slots of 4 KiB: half of them at NEAR and every NEAR_STEP bytes after it, the others
 * at FAR and every FAR_STEP bytes (all in bytes, those at NEAR first). Slots past the end of the
 * device are omitted. Records are written to the slots in turn, each with the next sequence number,
 * so at any moment a disk of n slots contains exactly the last n of them. A failed write is repeated
 * with the same number.
 *
 * A slot that was never written contains zeros or, at NEAR, the bytes that the second form writes to
 * stdout. -f: it must be the latter, as DEVICE is a new volume created from the image. -b: use the
 * page cache, where a file system refuses O_DIRECT. -n: end after this many writes. -r: writes per
 * second, 0 for no limit.
 *
 * SIGTERM ends it between two writes. It also ends when the device is removed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64
#define PAGE 4096
#define WORDS (PAGE / 8)
#define MAGIC 0x3130796e69547468ULL /* "htTiny01" */
#define SECOND 1000000000LL

struct record {
	uint64_t magic;
	uint64_t volume; /* random: distinguishes the records of two disks */
	uint64_t seq;
	uint64_t base; /* the first number of this layout; an extended disk starts a new one */
	uint32_t slot;
	uint32_t slots; /* of this layout */
	uint64_t payload[WORDS - 6];
	uint64_t checksum;
};
_Static_assert(sizeof(struct record) == PAGE, "a record is a page");

enum kind { EMPTY, RECORD, TORN, FOREIGN, UNKNOWN };

struct content {
	enum kind kind;
	uint64_t volume, seq, base;
	uint32_t slots;
};

static const char *device, *name;
static int fd, filled;
static volatile sig_atomic_t stopping;
static uint64_t near_at, near_step, far_at, far_step;
static uint32_t slots;
static struct content known[SLOTS];
static struct record *page, *back, *expected;

/* Shared with the thread that prints, which keeps doing so while the disk does not answer. */
static atomic_ullong acked, writes, reads, wrong;
static atomic_llong longest, began; /* ns; 0: no call is in progress */

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static void pause_ns(long long ns)
{
	struct timespec t = { ns / SECOND, ns % SECOND };

	nanosleep(&t, NULL);
}

/* Print a whole line in one call, as other processes write to the same console. */
static void say(const char *format, ...)
{
	char line[256];
	va_list rest;
	int length = snprintf(line, sizeof(line), "tiny: %s ", name);

	va_start(rest, format);
	length += vsnprintf(line + length, sizeof(line) - length - 1, format, rest);
	va_end(rest);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	if (write(STDOUT_FILENO, line, length) != length)
		_exit(3);
}

static void die(const char *what)
{
	say("ERROR %s: %s", what, strerror(errno));
	exit(3);
}

static uint64_t mix(uint64_t x) /* splitmix64 */
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static uint64_t offset_of(uint32_t slot)
{
	if (slot < SLOTS / 2)
		return near_at + slot * near_step;
	return far_at + (slot - SLOTS / 2) * far_step;
}

static void make(struct record *out, uint64_t volume, uint64_t seq, uint64_t base, uint32_t slot,
		 uint32_t of)
{
	const uint64_t *word = (const uint64_t *)out;
	uint64_t seed = mix(mix(volume ^ mix(seq)) ^ slot), sum = 0xcbf29ce484222325ULL;

	*out = (struct record){ MAGIC, volume, seq, base, slot, of, { 0 }, 0 };
	for (int i = 0; i < WORDS - 6 - 1; i++)
		out->payload[i] = seed = mix(seed);
	for (int i = 0; i < WORDS - 1; i++)
		sum = (sum ^ word[i]) * 0x100000001b3ULL; /* FNV-1a, of words */
	out->checksum = sum;
}

static void fill(uint64_t *out, uint64_t offset)
{
	for (int i = 0; i < WORDS; i++)
		out[i] = mix(offset + i * 8) | 1;
}

static int is_empty(const struct record *found, uint32_t slot)
{
	static const char zeroes[PAGE];
	uint64_t filler[WORDS];

	if (memcmp(found, zeroes, PAGE) == 0)
		return !(filled && slot < SLOTS / 2);
	fill(filler, offset_of(slot));
	return slot < SLOTS / 2 && memcmp(found, filler, PAGE) == 0;
}

/* Classify a page that was read from a slot. */
static struct content classify(const struct record *found, uint32_t slot)
{
	struct content is = { .kind = FOREIGN };

	if (is_empty(found, slot)) {
		is.kind = EMPTY;
	} else if (found->magic == MAGIC) {
		make(expected, found->volume, found->seq, found->base, found->slot, found->slots);
		is = (struct content){ RECORD, found->volume, found->seq, found->base, found->slots };
		if (memcmp(found, expected, PAGE) != 0)
			is.kind = TORN;
		else if (found->slot != slot)
			is.kind = FOREIGN;
	}
	return is;
}

static int same(struct content a, struct content b)
{
	return a.kind == b.kind && (a.kind == EMPTY || (a.volume == b.volume && a.seq == b.seq
							&& a.base == b.base && a.slots == b.slots));
}

static const char *text(struct content of, char *out, size_t size)
{
	static const char *const words[] = { "empty", "", "torn", "foreign", "unknown" };

	if (of.kind == RECORD)
		snprintf(out, size, "%" PRIu64, of.seq);
	else
		snprintf(out, size, "%s", words[of.kind]);
	return out;
}

static void report(uint32_t slot, struct content want, const char *got)
{
	char buffer[32];

	wrong++;
	say("WRONG slot=%u want=%s got=%s", slot, text(want, buffer, sizeof(buffer)), got);
}

/* Whether the device was detached, which is no error; its node vanishes shortly afterwards. */
static int gone(void)
{
	for (int i = 0; i < 50; i++) {
		if (access(device, F_OK) != 0)
			return 1;
		pause_ns(SECOND / 50);
	}
	return 0;
}

/* Read or write a whole page; report a failure and return -1. */
static int transfer(int writing, uint32_t slot, struct record *data, struct content want)
{
	ssize_t done;
	long long took;

	began = now();
	done = writing ? pwrite(fd, data, PAGE, offset_of(slot))
		       : pread(fd, data, PAGE, offset_of(slot));
	took = now() - began;
	began = 0;
	if (took > longest)
		longest = took;
	if (done == PAGE) {
		*(writing ? &writes : &reads) += 1;
		return 0;
	}
	const char *why = done < 0 ? strerrorname_np(errno) : "short";
	if (gone())
		exit(0);
	report(slot, want, why);
	return -1;
}

/* Compare a slot with its expected content; an error is reported once. */
static void verify(uint32_t slot)
{
	struct content found;
	char buffer[32];

	if (known[slot].kind == UNKNOWN || transfer(0, slot, back, known[slot]) != 0)
		return;
	found = classify(back, slot);
	if (same(found, known[slot]))
		return;
	/* The same number but another record: it belongs to another disk. */
	if (found.kind == RECORD && known[slot].kind == RECORD && found.seq == known[slot].seq)
		found.kind = FOREIGN;
	report(slot, known[slot], text(found, buffer, sizeof(buffer)));
	known[slot].kind = UNKNOWN;
}

/* Read all slots, report errors, and return the newest record. */
static struct content survey(void)
{
	struct content newest = { .kind = EMPTY };
	int failed[SLOTS] = { 0 };
	char buffer[32];

	for (uint32_t i = 0; i < slots; i++) {
		failed[i] = transfer(0, i, back, (struct content){ .kind = UNKNOWN }) != 0;
		known[i] = classify(back, i);
		if (failed[i])
			known[i].kind = UNKNOWN;
		else if (known[i].kind == RECORD && known[i].seq > newest.seq)
			newest = known[i];
	}
	for (uint32_t i = 0; i < slots; i++) {
		struct content want = newest;
		int older = known[i].kind == EMPTY
			    || (known[i].kind == RECORD && known[i].seq < newest.base
				&& known[i].volume == newest.volume);

		if (failed[i])
			continue;
		if (newest.kind == RECORD && i < newest.slots && newest.seq - newest.base >= i) {
			want.seq -= (newest.seq - newest.base - i) % newest.slots;
		} else {
			want.kind = EMPTY;
			/* Any complete record of an earlier layout may be here. */
			if (newest.base > 1 && older)
				want = known[i];
		}
		if (same(known[i], want))
			continue;
		if (known[i].kind == RECORD && want.kind == RECORD && known[i].seq == want.seq)
			known[i].kind = FOREIGN;
		report(i, want, text(known[i], buffer, sizeof(buffer)));
		known[i].kind = UNKNOWN;
	}
	if (newest.kind == RECORD)
		say("found seq=%" PRIu64, newest.seq);
	else if (wrong == 0)
		say("fresh");
	return newest;
}

static void progress(void)
{
	long long since = began;

	say("seq=%llu writes=%llu reads=%llu longest=%lld stall_now=%lld wrong=%llu", acked, writes,
	    reads, longest / 1000000, since ? (now() - since) / 1000000 : 0, wrong);
}

static void *printer(void *unused)
{
	for (;;) {
		pause_ns(SECOND);
		progress();
	}
	return unused;
}

static void stop(int signal)
{
	stopping = signal;
}

static uint64_t random_word(void)
{
	uint64_t word = 0;
	struct timespec t;

	/* There is little entropy right after a boot, so mix in the time of creation. */
	if (getrandom(&word, sizeof(word), GRND_INSECURE) < 0)
		word = 0;
	clock_gettime(CLOCK_REALTIME, &t);
	return mix(word ^ mix(t.tv_sec * SECOND + t.tv_nsec)) | 1;
}

static void write_fill(uint64_t offset, uint64_t length)
{
	uint64_t out[WORDS];

	for (uint64_t at = offset; at < offset + length; at += PAGE) {
		fill(out, at);
		if (fwrite(out, PAGE, 1, stdout) != 1)
			exit(3);
	}
	exit(fflush(stdout) == 0 ? 0 : 3);
}

static uint64_t number(const char *from)
{
	return strtoull(from, NULL, 0);
}

int main(int argc, char **argv)
{
	struct content newest;
	uint64_t limit = UINT64_MAX, rate = 50, made = 0;
	int option, flags = O_RDWR | O_DSYNC | O_DIRECT | O_CLOEXEC;
	pthread_t thread;

	if (argc == 4 && strcmp(argv[1], "fill") == 0)
		write_fill(number(argv[2]), number(argv[3]));
	while ((option = getopt(argc, argv, "bfn:r:")) != -1) {
		if (option == 'b')
			flags &= ~O_DIRECT;
		else if (option == 'f')
			filled = 1;
		else if (option == 'n')
			limit = number(optarg);
		else if (option == 'r')
			rate = number(optarg);
		else
			return 2;
	}
	if (argc - optind != 5)
		return 2;
	device = argv[optind];
	name = strrchr(device, '/') ? strrchr(device, '/') + 1 : device;
	near_at = number(argv[optind + 1]);
	near_step = number(argv[optind + 2]);
	far_at = number(argv[optind + 3]);
	far_step = number(argv[optind + 4]);

	fd = open(device, flags);
	if (fd < 0)
		die("cannot open it");
	page = aligned_alloc(PAGE, 3 * PAGE);
	if (!page)
		die("no memory");
	back = page + 1;
	expected = page + 2;
	uint64_t size = lseek(fd, 0, SEEK_END);
	while (slots < SLOTS && offset_of(slots) + PAGE <= size)
		slots++;
	if (slots == 0) {
		errno = ENOSPC;
		die("no slot fits");
	}

	signal(SIGTERM, stop);
	if (pthread_create(&thread, NULL, printer, NULL) != 0)
		die("no thread");
	newest = survey();
	acked = newest.seq;
	if (newest.kind == EMPTY)
		newest.volume = random_word();
	if (newest.slots != slots) {
		newest.base = newest.seq + 1;
		newest.slots = slots;
	}
	newest.kind = RECORD;

	long long next = now();
	while (!stopping && made < limit) {
		struct content record = newest;
		uint32_t slot;

		record.seq++;
		slot = (record.seq - record.base) % slots;
		make(page, record.volume, record.seq, record.base, slot, slots);
		known[slot].kind = UNKNOWN; /* until it is acknowledged */
		if (transfer(1, slot, page, record) == 0) {
			newest = known[slot] = record;
			acked = record.seq;
			made++;
			verify(slot);
			/* Hash the sequence number, so that the order differs in every round. */
			verify(mix(record.seq ^ record.volume) % slots);
		}
		if (rate) {
			next += SECOND / rate;
			if (next < now())
				next = now();
			pause_ns(next - now() > 0 ? next - now() : 0);
		}
	}
	progress();
	return wrong ? 1 : 0;
}
