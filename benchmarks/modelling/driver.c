/* A CUDA driver that does nothing, so that Triton's JIT and launcher run up to the driver call without a GPU. */
#include <stdint.h>
#include <stdlib.h>

typedef struct { int id; char pad[4]; union { char bytes[64]; int cooperative; } value; } Attribute;
typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void *stream;
    Attribute *attributes;
    unsigned count;
} Config; /* CUlaunchConfig */

enum { COOPERATIVE = 2, TOO_LARGE = 720 };
static long launches, cooperative_launches;
static unsigned room = 132; /* multiprocessors */

long stub_launches(void) { return launches; }
long stub_cooperative_launches(void) { return cooperative_launches; }
void stub_set_room(unsigned multiprocessors) { room = multiprocessors; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const char *text = getenv("STUB_CAPABILITY");
    int capability = text ? atoi(text) : 90;
    int shared = capability == 80 ? 166912 : capability == 90 || capability == 100 ? 232448 : 101376;
    switch (attribute) {
        case 10: *value = 32; break;               /* warp size */
        case 12: *value = 65536; break;            /* registers of a block */
        case 16: *value = room; break;             /* multiprocessors */
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 81: *value = shared + 1024; break;    /* shared memory of a multiprocessor */
        case 97: *value = shared; break;           /* of a block that asks for it */
        default: *value = 1;
    }
    return 0;
}

int cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)0x1000; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuGetErrorString(int error, const char **text) {
    *text = error == TOO_LARGE ? "too many blocks in cooperative launch" : "stub";
    return 0;
}

/* One program a multiprocessor fits, more may not: a cooperative launch of more is refused. */
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    for (unsigned i = 0; i < config->count; i++)
        if (config->attributes[i].id == COOPERATIVE && config->attributes[i].value.cooperative) {
            if (config->grid_x > room) return TOO_LARGE;
            cooperative_launches++;
        }
    launches++;
    return 0;
}

int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
