// Preloaded into Chromium, gives it Mesa's software adapter, which has shader-f16. Chromium takes no software adapter
// but SwiftShader, so that what asks for the library of that one gets this file, which hands on to the library that the
// variable LAVAPIPE names, and calls its device SwiftShader.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Function)(void);

void *dlopen(const char *path, int flags) {
  static void *(*open_library)(const char *, int);
  if (!open_library) open_library = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
  const char *slash = path ? strrchr(path, '/') : NULL;
  Dl_info caller, self;
  // WebGPU is a part of the program itself; libraries that ask are there for drawing, and get the real one.
  if (path && !strcmp(slash ? slash + 1 : path, "libvk_swiftshader.so") &&
      dladdr(__builtin_return_address(0), &caller) && !strstr(caller.dli_fname, ".so") &&
      dladdr((void *)dlopen, &self))
    path = self.dli_fname;
  return open_library(path, flags);
}

// Vendor and device are the third and fourth of VkPhysicalDeviceProperties' numbers, before which
// VkPhysicalDeviceProperties2 has 16 bytes.
static void (*properties)(void *, uint32_t *), (*properties2)(void *, uint32_t *);

static void get_properties(void *device, uint32_t *found) {
  properties(device, found);
  found[2] = 0x1AE0;
  found[3] = 0xC0DE;
}

static void get_properties2(void *device, uint32_t *found) {
  properties2(device, found);
  found[6] = 0x1AE0;
  found[7] = 0xC0DE;
}

Function vkGetInstanceProcAddr(void *instance, const char *name) {
  static Function (*find)(void *, const char *);
  if (!find) {
    void *driver = dlopen(getenv("LAVAPIPE"), RTLD_NOW | RTLD_LOCAL);
    if (driver) find = (Function(*)(void *, const char *))dlsym(driver, "vk_icdGetInstanceProcAddr");
    if (!find) return NULL;
  }
  Function found = find(instance, name);
  if (found && !strcmp(name, "vkGetPhysicalDeviceProperties")) {
    properties = (void (*)(void *, uint32_t *))found;
    return (Function)get_properties;
  }
  if (found && (!strcmp(name, "vkGetPhysicalDeviceProperties2") || !strcmp(name, "vkGetPhysicalDeviceProperties2KHR"))) {
    properties2 = (void (*)(void *, uint32_t *))found;
    return (Function)get_properties2;
  }
  return found;
}
