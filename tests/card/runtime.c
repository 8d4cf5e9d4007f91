/* A CUDA 13 runtime without a card: its memory is the host's, what is queued is done at once, and kernels do nothing
 * (`sitecustomize.py` computes what PyTorch's kernels would). All that PyTorch's own C++ does on top of it is real: its
 * caching allocator, streams, events, pinned memory, autograd's threads, its errors.
 *
 * Environment: CARD_GIB (8), CARD_COUNT (1), CARD_NAME, CARD_CAPABILITY (90). Functions of the runtime that are not here
 * are made by `run.py`; they succeed and do nothing.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, CARDS = 16 };
enum { UNREGISTERED, HOST, DEVICE };
#define CONTEXT (300ul << 20) /* what a process takes of a card before its first tensor */

/* As CUDA 13's driver_types.h has them, as far as they are read. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_nodes;
    size_t total, shared_block;
    int registers_block, warp;
    size_t pitch;
    int threads_block, threads_dim[3], grid[3];
    size_t constant;
    int major, minor;
    size_t texture, texture_pitch;
    int processors, integrated, maps_host;
    int textures_surfaces[39];
    size_t surface;
    int concurrent, ecc, bus, pci_device, domain, tcc, engines, unified, bus_width, l2, l2_persisting, threads_processor;
    int priorities, l1_global, l1_local;
    size_t shared_processor;
    int registers_processor, managed, multi, multi_group, atomics, pageable, concurrent_managed, preemption, registered;
    int cooperative;
    size_t shared_optin;
    int rest[82];
};
struct pointer { int type, device; void *on_device, *on_host; long reserved[8]; };
struct block { char *begin; size_t size; int kind, card; struct block *next; };

static __thread int card, last_error;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *blocks;
static size_t used[CARDS];
static long handles = 4096;

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}
static size_t total(void) { return (size_t)(atof(setting("CARD_GIB", "8")) * (1ul << 30)); }
static int cards(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int count = atoi(setting("CARD_COUNT", "1")), seen = 1;
    if (count > CARDS) count = CARDS;
    if (!visible) return count;
    if (!*visible || *visible == '-') return 0;
    for (; *visible; visible++) seen += *visible == ',';
    return seen < count ? seen : count;
}
static int fails(int error) { return last_error = error; }

static int take(void **pointer, size_t size, int kind) {
    *pointer = 0;
    pthread_mutex_lock(&lock); /* from the question to the block: threads take memory side by side */
    int full = kind == DEVICE && used[card] + size + CONTEXT > total();
    if (full || posix_memalign(pointer, 512, size ? size : 512)) {
        pthread_mutex_unlock(&lock);
        return fails(OUT_OF_MEMORY);
    }
    struct block *made = malloc(sizeof *made);
    *made = (struct block){*pointer, size, kind, card, blocks};
    blocks = made;
    if (kind == DEVICE) used[card] += size;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
static int give(void *pointer) {
    pthread_mutex_lock(&lock);
    for (struct block **at = &blocks; *at; at = &(*at)->next)
        if ((*at)->begin == pointer) {
            struct block *gone = *at;
            if (gone->kind == DEVICE) used[gone->card] -= gone->size;
            *at = gone->next;
            free(gone->begin);
            free(gone);
            break;
        }
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cudaMalloc(void **pointer, size_t size) { return take(pointer, size, DEVICE); }
int cudaFree(void *pointer) { return give(pointer); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return take(pointer, size, HOST); }
int cudaFreeHost(void *pointer) { return give(pointer); }
int cudaMemGetInfo(size_t *free_, size_t *all) {
    *all = total();
    pthread_mutex_lock(&lock);
    size_t taken = used[card] + CONTEXT;
    pthread_mutex_unlock(&lock);
    *free_ = taken < *all ? *all - taken : 0;
    return SUCCESS;
}
int cudaPointerGetAttributes(struct pointer *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    pthread_mutex_lock(&lock);
    for (struct block *one = blocks; one; one = one->next)
        if ((char *)pointer >= one->begin && (char *)pointer < one->begin + one->size)
            *found = (struct pointer){one->kind, one->card, (void *)pointer, one->kind == HOST ? (void *)pointer : 0};
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

static int move(void *to, const void *from, size_t size) { memmove(to, from, size); return SUCCESS; }
static int fill(void *to, int value, size_t size) { memset(to, value, size); return SUCCESS; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return move(to, from, size); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return move(to, from, size); }
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) {
    return move(to, from, size);
}
int cudaMemset(void *to, int value, size_t size) { return fill(to, value, size); }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { return fill(to, value, size); }

int cudaGetDevice(int *found) { *found = card; return SUCCESS; }
int cudaSetDevice(int number) {
    if (number < 0 || number >= cards()) return fails(INVALID_DEVICE);
    card = number;
    return SUCCESS;
}
int cudaGetDeviceCount(int *count) { *count = cards(); return *count ? SUCCESS : fails(NO_DEVICE); }
int cudaGetDeviceProperties(struct properties *found, int number) {
    int capability = atoi(setting("CARD_CAPABILITY", "90"));
    memset(found, 0, sizeof *found);
    snprintf(found->name, sizeof found->name, "%s", setting("CARD_NAME", "Pretended card"));
    found->uuid[0] = found->bus = number + 1;
    found->total = total();
    found->major = capability / 10, found->minor = capability % 10;
    found->shared_block = 48 << 10, found->shared_processor = 228 << 10, found->shared_optin = 227 << 10;
    found->registers_block = found->registers_processor = 64 << 10;
    found->warp = 32, found->threads_block = 1024, found->threads_processor = 2048, found->processors = 132;
    found->threads_dim[0] = found->threads_dim[1] = 1024, found->threads_dim[2] = 64;
    found->grid[0] = 2147483647, found->grid[1] = found->grid[2] = 65535;
    found->l2 = 50 << 20, found->bus_width = 5120, found->texture = 512;
    found->unified = found->managed = found->concurrent = found->maps_host = 1;
    return SUCCESS;
}
int cudaDeviceGetAttribute(int *value, int attribute, int number) {
    int capability = atoi(setting("CARD_CAPABILITY", "90"));
    *value = attribute == 1 ? 1024 : attribute == 10 ? 32 : attribute == 16 ? 132 : attribute == 75 ? capability / 10
        : attribute == 76 ? capability % 10 : attribute == 97 ? 227 << 10 : 1;
    return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *name, int size, int number) {
    snprintf(name, size, "0000:%02x:00.0", number + 1);
    return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 0; return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }

int cudaGetLastError(void) { int error = last_error; last_error = SUCCESS; return error; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(int error) {
    return error == OUT_OF_MEMORY ? "out of memory" : error == NO_DEVICE ? "no CUDA-capable device is detected"
        : error == INVALID_DEVICE ? "invalid device ordinal" : error ? "pretended error" : "no error";
}
const char *cudaGetErrorName(int error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaError"; }

static int handle(void **made) { *made = (void *)__sync_add_and_fetch(&handles, 16); return SUCCESS; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return handle(stream); }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void *graph, void *nodes, void *edges,
                             size_t *count) {
    *status = 0;
    if (id) *id = 0;
    if (count) *count = 0;
    return SUCCESS;
}
int cudaStreamAddCallback(void *stream, void (*call)(void *, int, void *), void *data, unsigned flags) {
    call(stream, SUCCESS, data);
    return SUCCESS;
}
int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *data) { call(data); return SUCCESS; }

/* An event is the time at which it was recorded, in ms. */
int cudaEventCreateWithFlags(double **event, unsigned flags) { *event = calloc(1, sizeof **event); return SUCCESS; }
int cudaEventCreate(double **event) { return cudaEventCreateWithFlags(event, 0); }
int cudaEventDestroy(double *event) { free(event); return SUCCESS; }
int cudaEventRecord(double *event, void *stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *event = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    return SUCCESS;
}
int cudaEventRecordWithFlags(double *event, void *stream, unsigned flags) { return cudaEventRecord(event, stream); }
int cudaEventElapsedTime(float *ms, double *begin, double *end) { *ms = *end - *begin; return SUCCESS; }

static int nothing(void) { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                     int *status) {
    *found = (void *)nothing;
    if (status) *status = SUCCESS;
    return SUCCESS;
}
int cudaFuncGetAttributes(int *found, const void *kernel) {
    memset(found, 0, 64);
    found[6] = 1024; /* threads a block, after three sizes */
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int size, size_t shared,
                                                           unsigned flags) {
    *count = 2;
    return SUCCESS;
}
int cudaGetSymbolAddress(void **found, const void *symbol) {
    static char room[1 << 16];
    *found = room;
    return SUCCESS;
}
void **__cudaRegisterFatBinary(void *binary) { static void *known[1]; return known; }
