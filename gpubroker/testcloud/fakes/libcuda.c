/* A test fixture: libcuda.so.1 for a machine without a GPU. It answers what the facts file beside it says,
 * as the driver of a rented host would; it computes nothing. Built and placed by nodes_home.py.
 * Error numbers and attributes: CUDA driver API, CUresult and CUdevice_attribute. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101 };
enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, FACT_BYTES = 256 };
#define MIB ((size_t)1 << 20)

typedef struct { int device; } Context;

static int initialised;
static size_t copied; /* bytes to all devices so far: what an event measures */
static size_t taken[64]; /* bytes per device */
static Context *current;

/* The value of a key in <this library's folder>/facts; 0 when there is none. */
static int fact(const char *key, char *value)
{
    Dl_info own;
    char path[4096], line[FACT_BYTES];
    size_t length = strlen(key);
    int found = 0;
    if (!dladdr((void *)&initialised, &own) || strlen(own.dli_fname) > sizeof path - 16)
        return 0;
    strcpy(path, own.dli_fname);
    char *end = strrchr(path, '/');
    strcpy(end ? end : path, "/facts");
    FILE *file = fopen(path, "r");
    while (file && !found && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, key, length) && line[length] == '=') {
            strcpy(value, line + length + 1);
            found = 1;
        }
    }
    if (file)
        fclose(file);
    return found;
}

static long number(const char *key)
{
    char value[FACT_BYTES];
    return fact(key, value) ? atol(value) : 0;
}

/* Devices that the driver still finds. */
static long there(void)
{
    return number("gpu_count") - number("lost_gpus");
}

static int check(int device)
{
    if (!initialised)
        return NOT_INITIALIZED;
    return device < 0 || device >= there() || device >= 64 ? INVALID_DEVICE : OK;
}

static void capability(int *major, int *minor)
{
    char value[FACT_BYTES];
    *major = *minor = 0;
    if (fact("capability", value))
        sscanf(value, "%d.%d", major, minor);
}

static size_t free_bytes(int device)
{
    long foreign = device == 0 ? number("foreign_process_mib") : 0;
    return (size_t)(number("memory_mib") - foreign) * MIB - taken[device];
}

int cuInit(unsigned flags)
{
    long error = number("cuda_error");
    if (flags)
        return INVALID_VALUE;
    if (error)
        return (int)error;
    if (!there())
        return NO_DEVICE;
    initialised = 1;
    return OK;
}

int cuDriverGetVersion(int *version)
{
    char value[FACT_BYTES];
    int major = 0, minor = 0;
    if (fact("cuda", value))
        sscanf(value, "%d.%d", &major, &minor);
    *version = major * 1000 + minor * 10;
    return OK;
}

int cuDeviceGetCount(int *count)
{
    *count = (int)there();
    return initialised ? OK : NOT_INITIALIZED;
}

int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return check(ordinal);
}

int cuDeviceGetName(char *name, int length, int device)
{
    char value[FACT_BYTES] = "";
    if (length <= 0)
        return INVALID_VALUE;
    fact("gpu_name", value);
    snprintf(name, (size_t)length, "%s", value);
    return check(device);
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    *bytes = (size_t)number("memory_mib") * MIB;
    return check(device);
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    int major, minor;
    capability(&major, &minor);
    *value = attribute == CAPABILITY_MAJOR ? major : attribute == CAPABILITY_MINOR ? minor
           : attribute == MULTIPROCESSORS ? 108 : 0;
    return check(device);
}

int cuCtxCreate_v2(void **context, unsigned flags, int device)
{
    int error = check(device);
    (void)flags;
    if (error)
        return error;
    current = malloc(sizeof *current);
    current->device = device;
    *context = current;
    return OK;
}

int cuCtxDestroy_v2(void *context)
{
    if (context == current)
        current = NULL;
    free(context);
    return OK;
}

int cuCtxSynchronize(void)
{
    return current ? OK : NOT_INITIALIZED;
}

int cuMemGetInfo_v2(size_t *free_now, size_t *total)
{
    if (!current)
        return NOT_INITIALIZED;
    *total = (size_t)number("memory_mib") * MIB;
    *free_now = free_bytes(current->device);
    return OK;
}

/* The address is that of a note of the size: nothing may be read or written through it. */
int cuMemAlloc_v2(unsigned long long *address, size_t bytes)
{
    if (!current)
        return NOT_INITIALIZED;
    if (!bytes)
        return INVALID_VALUE;
    if (bytes > free_bytes(current->device))
        return OUT_OF_MEMORY;
    size_t *note = malloc(sizeof *note);
    *note = bytes;
    taken[current->device] += bytes;
    *address = (unsigned long long)(size_t)note;
    return OK;
}

int cuMemFree_v2(unsigned long long address)
{
    if (!current || !address)
        return INVALID_VALUE;
    taken[current->device] -= *(size_t *)(size_t)address;
    free((void *)(size_t)address);
    return OK;
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    (void)flags;
    *memory = current ? malloc(bytes) : NULL;
    return *memory ? OK : OUT_OF_MEMORY;
}

int cuMemFreeHost(void *memory)
{
    free(memory);
    return OK;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t bytes)
{
    if (!current || !to || !from || bytes > *(size_t *)(size_t)to)
        return INVALID_VALUE;
    copied += bytes;
    return OK;
}

/* A CUDA event: time passes by what is copied in between, at the speed of the lanes in the facts. */
int cuEventCreate(size_t **event, unsigned flags)
{
    (void)flags;
    *event = calloc(1, sizeof **event);
    return OK;
}

int cuEventRecord(size_t *event, void *stream)
{
    (void)stream;
    *event = copied;
    return OK;
}

int cuEventSynchronize(size_t *event)
{
    return event ? OK : INVALID_VALUE;
}

int cuEventElapsedTime(float *ms, size_t *start, size_t *end)
{
    *ms = (float)((double)(*end - *start) / (0.8e6 * (double)number("pcie_lanes"))); /* 0.8 GB/s a lane */
    return OK;
}

int cuGetErrorString(int error, const char **text)
{
    *text = error == OK ? "no error" : error == OUT_OF_MEMORY ? "out of memory"
          : error == NO_DEVICE ? "no CUDA-capable device is detected"
          : error == 802 ? "system not yet initialized" : "error";
    return OK;
}
