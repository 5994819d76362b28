// The importable module. Loading it registers the kernels (see ops/); what it offers itself is how it was
// built.
#include <Python.h>

#if defined(CONVVIZ_WITH_CUDA)
#include <cuda.h>
#endif

#define CONVVIZ_QUOTE_(x) #x
#define CONVVIZ_QUOTE(x) CONVVIZ_QUOTE_(x)

namespace {

#if defined(CONVVIZ_WITH_CUDA)
constexpr int kCudaMajor = CUDA_VERSION / 1000, kCudaMinor = CUDA_VERSION % 1000 / 10;
#endif

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#if defined(CONVVIZ_CUDA_ARCHS)
constexpr const char* kCudaArchs = CONVVIZ_QUOTE(CONVVIZ_CUDA_ARCHS);
#else
constexpr const char* kCudaArchs = "";
#endif

PyObject* build_info(PyObject*, PyObject*) {
#if defined(CONVVIZ_WITH_CUDA)
  PyObject* cuda = PyUnicode_FromFormat("%d.%d", kCudaMajor, kCudaMinor);
#else
  PyObject* cuda = PyUnicode_FromString("none");
#endif
  if (cuda == nullptr) return nullptr;
  const unsigned long long target = TORCH_TARGET_VERSION;
  PyObject* torch_target = PyUnicode_FromFormat("%d.%d", static_cast<int>(target >> 56 & 0xff),
                                                static_cast<int>(target >> 48 & 0xff));
  if (torch_target == nullptr) {
    Py_DECREF(cuda);
    return nullptr;
  }
  return Py_BuildValue("{s:N,s:s,s:N,s:s}", "cuda", cuda, "cuda_archs", kCudaArchs, "torch_target",
                       torch_target, "compiler", kCompiler);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "How this module was built: a dict of strings."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "convviz_cuda's native kernels.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&definition);
}
