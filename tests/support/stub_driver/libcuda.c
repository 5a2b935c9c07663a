// A CUDA driver without a GPU: two devices, contexts, libraries and kernels that are only noted, and a launch that keeps
// what it was given. stub_driver.py adds every other function of the driver and builds a libcuda.so.1 of the two; each
// function answers with ENTER first, so that a test can count calls and let any of them fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { DEVICES = 2, ARGUMENTS = 512, MAX_LAUNCHES = 64, MAX_NAMES = 1024 };

typedef struct {
  const char* name;
  int calls;
  CUresult error;
} Function;

typedef struct {
  void* kernel;
  unsigned grid[3], block[3], shared;
  int device;
  void *stream, *parameter;
  unsigned char arguments[ARGUMENTS];
} Launch;

typedef struct {
  int loaded;
  size_t kernels;
} Library;

typedef struct {
  Library* library;
  char name[64];
} Kernel;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Function functions[MAX_NAMES];
static int function_count, launch_count, unloaded;
static CUresult sticky;
static size_t argument_bytes;
static Launch launches[MAX_LAUNCHES];
static int contexts[DEVICES];
static __thread int* current;

static Function* find(const char* name) {
  for (int i = 0; i < function_count; i++)
    if (!strcmp(functions[i].name, name)) return &functions[i];
  if (function_count == MAX_NAMES) abort();
  functions[function_count].name = strdup(name);
  return &functions[function_count++];
}

static CUresult enter(Function** known, const char* name) {
  pthread_mutex_lock(&lock);
  if (!*known) *known = find(name);
  (*known)->calls++;
  CUresult error = sticky ? sticky : (*known)->error;
  pthread_mutex_unlock(&lock);
  return error;
}

#define ENTER                                    \
  do {                                           \
    static Function* known;                      \
    CUresult error = enter(&known, __func__);    \
    if (error) return error;                     \
  } while (0)

// What tests ask and set.
void stub_fail(const char* name, CUresult error) { pthread_mutex_lock(&lock); find(name)->error = error; pthread_mutex_unlock(&lock); }
void stub_break(CUresult error) { sticky = error; }
void stub_argument_bytes(size_t bytes) { argument_bytes = bytes; }
int stub_calls(const char* name) { pthread_mutex_lock(&lock); int calls = find(name)->calls; pthread_mutex_unlock(&lock); return calls; }
int stub_unloaded(void) { return unloaded; }
int stub_launches(void) { return launch_count; }
int stub_functions(void) { return function_count; }
const char* stub_function(int number) { return functions[number].name; }
// What cudaSetDevice does, of CUDA's runtime that torch calls.
void stub_set_device(int device) { current = &contexts[device]; }
void stub_launch(int number, Launch* launch) { *launch = launches[number % MAX_LAUNCHES]; }

CUresult cuInit(unsigned flags) { ENTER; return SUCCESS; }
CUresult cuDriverGetVersion(int* version) { ENTER; *version = 13000; return SUCCESS; }
CUresult cuDeviceGetCount(int* count) { ENTER; *count = DEVICES; return SUCCESS; }
CUresult cuDeviceGet(int* device, int ordinal) {
  ENTER;
  *device = ordinal;
  return ordinal >= 0 && ordinal < DEVICES ? SUCCESS : INVALID_DEVICE;
}
CUresult cuDeviceGetName(char* name, int length, int device) { ENTER; snprintf(name, length, "stub %d", device); return SUCCESS; }
// Compute capability 9.0 and 12.0; 1 for whatever else is asked.
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER;
  enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };
  *value = attribute == CAPABILITY_MAJOR ? (device ? 12 : 9) : attribute != CAPABILITY_MINOR;
  return SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER;
  if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
  *context = &contexts[device];
  return SUCCESS;
}
CUresult cuCtxGetCurrent(void** context) { ENTER; *context = current; return SUCCESS; }
CUresult cuCtxSetCurrent(void* context) { ENTER; current = context; return SUCCESS; }
CUresult cuCtxPushCurrent(void* context) { ENTER; current = context; return SUCCESS; }
CUresult cuCtxPopCurrent(void** context) { ENTER; *context = current; return SUCCESS; }
CUresult cuCtxGetDevice(int* device) { ENTER; if (!current) return INVALID_CONTEXT; *device = current - contexts; return SUCCESS; }
CUresult cuCtxGetId(void* context, unsigned long long* id) { ENTER; *id = 1; return SUCCESS; }
CUresult cuGetExportTable(const void** table, const void* id) { ENTER; *table = NULL; return NOT_SUPPORTED; }
const char* error_name(CUresult error);  // written by stub_driver.py
CUresult cuGetErrorName(CUresult error, const char** name) { *name = error_name(error); return *name ? SUCCESS : INVALID_VALUE; }
CUresult cuGetErrorString(CUresult error, const char** text) { *text = "a test asked for it"; return SUCCESS; }

CUresult cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
  ENTER;
  if (memcmp(code, "\177ELF", 4)) return INVALID_VALUE;
  Library* made = calloc(1, sizeof(Library));
  made->loaded = 1;
  *library = made;
  return SUCCESS;
}
CUresult cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  ENTER;
  Kernel* made = calloc(1, sizeof(Kernel));
  made->library = library;
  strncpy(made->name, name, sizeof made->name - 1);
  *kernel = made;
  return SUCCESS;
}
CUresult cuLibraryUnload(void* library) {
  ENTER;
  ((Library*)library)->loaded = 0;
  unloaded++;
  return SUCCESS;
}
CUresult cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void* stream, void** parameters, void** extra) {
  ENTER;
  if (!current || extra || argument_bytes > ARGUMENTS) return current ? INVALID_VALUE : INVALID_CONTEXT;
  if (!((Kernel*)kernel)->library->loaded) return NOT_FOUND;
  pthread_mutex_lock(&lock);
  Launch* launch = &launches[launch_count++ % MAX_LAUNCHES];
  *launch = (Launch){kernel, {gx, gy, gz}, {bx, by, bz}, shared, current - contexts, stream, parameters[0]};
  memcpy(launch->arguments, parameters[0], argument_bytes);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

CUresult cuGetProcAddress_v2(const char* name, void** address, int version, unsigned long long flags, int* status) {
  ENTER;
  static void* self;
  if (!self) {
    Dl_info info;
    dladdr((void*)cuGetProcAddress_v2, &info);
    self = dlopen(info.dli_fname, RTLD_NOW);
  }
  *address = dlsym(self, name);
  if (status) *status = *address ? 0 : 1;
  return *address ? SUCCESS : NOT_FOUND;
}
