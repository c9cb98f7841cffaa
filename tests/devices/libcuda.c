/* As much of the CUDA driver's API as tutti/devices/ipc.py calls, over POSIX shared memory, and stricter.

   Built as libcuda.so.1, it stands under the real cuda-bindings: what they pass arrives here as it would on a GPU.
   It refuses what a driver may let through or punish late: calls without a current context, calls that would spoil
   a capture of another thread, streams that wait for others, copies outside of an allocation. Copies happen when
   their stream is synchronised, never before.

   FAKE_CUDA_DEVICES=N       how many devices there are (2)
   FAKE_CUDA_FAIL=CALL:CODE  let a function fail */

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };
enum { DEVICES = 8, ALLOCATIONS = 256, COPIES = 64, THREAD_LOCAL = 1 };

typedef unsigned long long address_t;
typedef struct { int device, retained; } context_t;
typedef struct { void *to; const void *from; size_t size; } copy_t;
typedef struct { context_t *context; int count; copy_t copies[COPIES]; } stream_t;
typedef struct { char name[40]; unsigned long long size; int pid, device; } handle_t; /* 56 of 64 bytes */
typedef struct { handle_t what; char *base; int openings; } allocation_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static context_t contexts[DEVICES];
static allocation_t allocations[ALLOCATIONS];
static int made, is_begun;
static volatile int is_waiting, is_shut;
static _Thread_local context_t *stack[16];
static _Thread_local int depth, mode;

static int devices(void) { const char *text = getenv("FAKE_CUDA_DEVICES"); return text ? atoi(text) : 2; }

static int failure(const char *call) {
    const char *text = getenv("FAKE_CUDA_FAIL");
    size_t length = strlen(call);
    return text && !strncmp(text, call, length) && text[length] == ':' ? atoi(text + length + 1) : 0;
}

/* What every call needs that does something on a device. */
static int ready(const char *call) {
    int code = failure(call);
    if (code) return code;
    if (!depth) return INVALID_CONTEXT;
    return mode == THREAD_LOCAL ? 0 : CAPTURE_UNSUPPORTED;
}

static allocation_t *at(address_t address, size_t size) {
    for (int n = 0; n < ALLOCATIONS; n++) {
        allocation_t *one = &allocations[n];
        if (one->openings && address >= (address_t)one->base && size <= one->what.size
            && address - (address_t)one->base <= one->what.size - size) return one;
    }
    return NULL;
}

static allocation_t *vacant(void) {
    for (int n = 0; n < ALLOCATIONS; n++) if (!allocations[n].openings) return &allocations[n];
    abort();
}

static char *map(const char *name, size_t size, int flags) {
    int descriptor = shm_open(name, O_RDWR | flags, 0600);
    if (descriptor < 0 || (flags && ftruncate(descriptor, (off_t)size))) return NULL;
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    return base == MAP_FAILED ? NULL : base;
}

int cuInit(unsigned flags) {
    (void)flags;
    is_begun = 1;
    return failure("cuInit") ? failure("cuInit") : devices() ? 0 : NO_DEVICE;
}

int cuDeviceGetCount(int *count) { *count = devices(); return is_begun ? failure("cuDeviceGetCount") : 3; }

int cuDeviceGet(int *device, int number) {
    if (number < 0 || number >= devices()) return INVALID_DEVICE;
    *device = number;
    return 0;
}

int cuDevicePrimaryCtxRetain(context_t **context, int device) {
    int code = failure("cuDevicePrimaryCtxRetain");
    if (code) return code;
    contexts[device].device = device;
    contexts[device].retained++;
    *context = &contexts[device];
    return 0;
}

int cuDevicePrimaryCtxRelease(int device) { return --contexts[device].retained < 0 ? INVALID_CONTEXT : 0; }

int cuCtxPushCurrent(context_t *context) {
    if (!context || context->retained < 1 || depth == 16) return INVALID_CONTEXT;
    stack[depth++] = context;
    return 0;
}

int cuCtxPopCurrent(context_t **context) {
    if (!depth) return INVALID_CONTEXT;
    *context = stack[--depth];
    return 0;
}

int cuThreadExchangeStreamCaptureMode(int *wanted) {
    int before = mode;
    mode = *wanted;
    *wanted = before;
    return 0;
}

int cuStreamCreate(stream_t **stream, unsigned flags) {
    int code = ready("cuStreamCreate");
    if (code) return code;
    if (flags != 1) return INVALID_VALUE; /* CU_STREAM_NON_BLOCKING */
    *stream = calloc(1, sizeof **stream);
    (*stream)->context = stack[depth - 1];
    return 0;
}

int cuStreamSynchronize(stream_t *stream) {
    int code = ready("cuStreamSynchronize");
    if (code) return code;
    for (int ms = 0; is_shut; ms++) {
        is_waiting = 1;
        if (ms == 30000) return 702; /* CUDA_ERROR_LAUNCH_TIMEOUT */
        usleep(1000);
    }
    pthread_mutex_lock(&lock);
    for (int n = 0; n < stream->count; n++) memcpy(stream->copies[n].to, stream->copies[n].from, stream->copies[n].size);
    stream->count = 0;
    pthread_mutex_unlock(&lock);
    return 0;
}

static int enqueue(const char *call, stream_t *stream, void *to, const void *from, size_t size, address_t on_device) {
    int code = ready(call);
    if (code) return code;
    if (!stream || stream->context != stack[depth - 1]) return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    code = !size || !at(on_device, size) || stream->count == COPIES ? INVALID_VALUE : 0;
    if (!code) stream->copies[stream->count++] = (copy_t){to, from, size};
    pthread_mutex_unlock(&lock);
    return code;
}

int cuMemcpyDtoHAsync(void *to, address_t from, size_t size, stream_t *stream) {
    return enqueue("cuMemcpyDtoHAsync", stream, to, (const void *)from, size, from);
}

int cuMemcpyHtoDAsync(address_t to, const void *from, size_t size, stream_t *stream) {
    return enqueue("cuMemcpyHtoDAsync", stream, (void *)to, from, size, to);
}

int cuMemAlloc(address_t *address, size_t size) {
    int code = ready("cuMemAlloc");
    if (code) return code;
    pthread_mutex_lock(&lock);
    allocation_t *one = vacant();
    memset(one, 0, sizeof *one);
    snprintf(one->what.name, sizeof one->what.name, "/tutti_fake_cuda_%d_%d", (int)getpid(), ++made);
    one->what.size = size;
    one->what.pid = (int)getpid();
    one->what.device = stack[depth - 1]->device;
    one->base = map(one->what.name, size, O_CREAT | O_EXCL);
    one->openings = 1;
    *address = (address_t)one->base;
    pthread_mutex_unlock(&lock);
    return one->base ? 0 : 2;
}

int cuMemFree(address_t address) {
    allocation_t *one = at(address, 1);
    if (!one || one->what.pid != (int)getpid()) return INVALID_VALUE;
    munmap(one->base, one->what.size);
    shm_unlink(one->what.name);
    one->openings = 0;
    return 0;
}

int cuIpcGetMemHandle(char *handle, address_t address) {
    allocation_t *one = at(address, 1);
    if (!one) return INVALID_VALUE;
    memset(handle, 0, 64);
    memcpy(handle, &one->what, sizeof one->what);
    return 0;
}

typedef struct { char bytes[64]; } raw_handle_t; /* passed by value */

int cuIpcOpenMemHandle(address_t *address, raw_handle_t raw, unsigned flags) {
    int code = ready("cuIpcOpenMemHandle");
    if (code) return code;
    handle_t what;
    memcpy(&what, raw.bytes, sizeof what);
    if (flags != 1) return INVALID_VALUE; /* lazy peer access, the one there is */
    if (what.pid == (int)getpid()) return INVALID_CONTEXT;
    if (strncmp(what.name, "/tutti_fake_cuda_", 17)) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    allocation_t *one = NULL;
    for (int n = 0; n < ALLOCATIONS; n++)
        if (allocations[n].openings && !memcmp(&allocations[n].what, &what, sizeof what)) one = &allocations[n];
    if (!one) {
        char *base = map(what.name, what.size, 0);
        if (base) {
            one = vacant();
            *one = (allocation_t){what, base, 0};
        }
    }
    if (one) {
        one->openings++;
        *address = (address_t)one->base;
    }
    pthread_mutex_unlock(&lock);
    return one ? 0 : INVALID_VALUE;
}

int cuIpcCloseMemHandle(address_t address) {
    int code = ready("cuIpcCloseMemHandle");
    if (code) return code;
    pthread_mutex_lock(&lock);
    allocation_t *one = at(address, 1);
    code = one && one->base == (char *)address ? 0 : INVALID_VALUE;
    if (!code && !--one->openings) munmap(one->base, one->what.size);
    pthread_mutex_unlock(&lock);
    return code;
}

int cuMemGetAddressRange(address_t *base, size_t *size, address_t address) {
    int code = ready("cuMemGetAddressRange");
    if (code) return code;
    allocation_t *one = at(address, 1);
    if (!one) return NOT_FOUND;
    *base = (address_t)one->base;
    *size = one->what.size;
    return 0;
}

/* For the test: what this process has open, what this thread has current, how many contexts are retained. */
int fake_openings(void) { int sum = 0; for (int n = 0; n < ALLOCATIONS; n++) sum += allocations[n].openings; return sum; }
int fake_depth(void) { return depth; }
int fake_mode(void) { return mode; }
int fake_retained(void) { int sum = 0; for (int n = 0; n < DEVICES; n++) sum += contexts[n].retained; return sum; }

/* While the gate is shut, synchronisations wait. */
int fake_is_waiting(void) { return is_waiting; }
void fake_shut_gate(int shut) { is_shut = shut; }

#define KNOWN(name) {#name, (void *)name}
static const struct { const char *name; void *function; } known[] = {
    KNOWN(cuInit), KNOWN(cuDeviceGetCount), KNOWN(cuDeviceGet), KNOWN(cuDevicePrimaryCtxRetain),
    KNOWN(cuDevicePrimaryCtxRelease), KNOWN(cuCtxPushCurrent), KNOWN(cuCtxPopCurrent),
    KNOWN(cuThreadExchangeStreamCaptureMode), KNOWN(cuStreamCreate), KNOWN(cuStreamSynchronize),
    KNOWN(cuMemcpyDtoHAsync), KNOWN(cuMemcpyHtoDAsync), KNOWN(cuMemAlloc), KNOWN(cuMemFree), KNOWN(cuIpcGetMemHandle),
    KNOWN(cuIpcOpenMemHandle), KNOWN(cuIpcCloseMemHandle), KNOWN(cuMemGetAddressRange),
};

/* How the bindings find all the others. */
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    *function = NULL;
    for (size_t n = 0; n < sizeof known / sizeof *known; n++)
        if (!strcmp(known[n].name, name)) *function = known[n].function;
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : NOT_FOUND;
}
