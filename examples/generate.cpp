// Generate text in C++: a folder that `ortlm build` wrote, run by onnxruntime-genai through its C API.
//
// Needs the shared libraries of onnxruntime-genai and ONNX Runtime; the Python wheels hold both:
//
//     pip install onnxruntime-genai
//     GENAI=$(python -c 'import onnxruntime_genai as g; print(g.__path__[0])')
//     ORT=$(python -c 'import onnxruntime as o; print(o.__path__[0])')
//     export ORT_LIB_PATH=$(ls $ORT/capi/libonnxruntime.so.*)
//     g++ -std=c++17 generate.cpp -o generate -L$GENAI -lonnxruntime-genai -Wl,-rpath,$GENAI
//     ./generate phi "The capital of France is" 32
//
// The header ort_genai_c.h is not in the wheels. It is in include/ of the release archives of
// github.com/microsoft/onnxruntime-genai; add -I for that folder. Without it, the declarations below are enough here.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#if __has_include("ort_genai_c.h")
#include "ort_genai_c.h"
#else
extern "C" {
struct OgaResult; struct OgaModel; struct OgaTokenizer; struct OgaTokenizerStream; struct OgaSequences;
struct OgaGeneratorParams; struct OgaGenerator;
const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateModel(const char* folder, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** text);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t row);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double);
OgaResult* OgaGeneratorParamsSetSearchBool(OgaGeneratorParams*, const char* name, bool);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(const OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
OgaResult* OgaGenerator_GetNextTokens(const OgaGenerator*, const int32_t** tokens, size_t* count);
void OgaDestroyResult(OgaResult*);
void OgaDestroyModel(OgaModel*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaShutdown();
}
#endif

template <auto destroy>
struct Destroy {
  template <class T>
  void operator()(T* object) const { destroy(object); }
};

void check(OgaResult* result) {
  if (!result) return;
  std::unique_ptr<OgaResult, Destroy<OgaDestroyResult>> owned(result);
  throw std::runtime_error(OgaResultGetError(result));
}

// Calls a function of the C API whose last argument receives a new object, and owns that.
template <class T, auto destroy, class Create, class... Arguments>
std::unique_ptr<T, Destroy<destroy>> make(Create create, Arguments... arguments) {
  T* made = nullptr;
  check(create(arguments..., &made));
  return std::unique_ptr<T, Destroy<destroy>>(made);
}

void generate(const char* folder, const char* prompt, int new_tokens) {
  auto model = make<OgaModel, OgaDestroyModel>(OgaCreateModel, folder);
  auto tokenizer = make<OgaTokenizer, OgaDestroyTokenizer>(OgaCreateTokenizer, model.get());
  auto stream = make<OgaTokenizerStream, OgaDestroyTokenizerStream>(OgaCreateTokenizerStream, tokenizer.get());
  auto ids = make<OgaSequences, OgaDestroySequences>(OgaCreateSequences);
  check(OgaTokenizerEncode(tokenizer.get(), prompt, ids.get()));

  auto params = make<OgaGeneratorParams, OgaDestroyGeneratorParams>(OgaCreateGeneratorParams, model.get());
  const auto length = OgaSequencesGetSequenceCount(ids.get(), 0) + new_tokens;
  check(OgaGeneratorParamsSetSearchNumber(params.get(), "max_length", static_cast<double>(length)));
  check(OgaGeneratorParamsSetSearchBool(params.get(), "do_sample", false));
  auto generator = make<OgaGenerator, OgaDestroyGenerator>(OgaCreateGenerator, model.get(), params.get());
  check(OgaGenerator_AppendTokenSequences(generator.get(), ids.get()));

  std::string token_ids;
  while (!OgaGenerator_IsDone(generator.get())) {
    check(OgaGenerator_GenerateNextToken(generator.get()));
    const int32_t* tokens = nullptr;
    size_t rows = 0;
    check(OgaGenerator_GetNextTokens(generator.get(), &tokens, &rows));
    const char* text = nullptr;
    check(OgaTokenizerStreamDecode(stream.get(), tokens[0], &text));
    std::printf("%s", text);
    std::fflush(stdout);
    token_ids += " " + std::to_string(tokens[0]);
  }
  std::printf("\ntoken ids:%s\n", token_ids.c_str());
}

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s MODEL PROMPT NEW_TOKENS\n", argv[0]);
    return 2;
  }
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // Both libraries send telemetry otherwise. Windows has _putenv_s.
  generate(argv[1], argv[2], std::atoi(argv[3]));
  OgaShutdown();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
