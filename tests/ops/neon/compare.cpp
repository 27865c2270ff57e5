// Compare the instruction sets of one library with each other, where no Python runs: under an emulator.
#include "../../../fairy2i/csrc/kernels.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
const char* fairy2i_instruction_set(int32_t index, int32_t* runs);
int32_t fairy2i_choose(const char* name);
int64_t fairy2i_words(const Layer*);
int32_t fairy2i_pack(const Layer*, const uint8_t*, uint32_t*);
int32_t fairy2i_linear(int32_t, const Layer* const*, const void*, void* const*, const float* const*, int64_t, int32_t, int32_t);
}

int main() {
    int compared = 0;
    for (int kind = 0; kind < 2; kind++)
        for (int stages = 1; stages <= (kind == KIND_PHASE ? 3 : 2); stages++)
            for (int where = 0; where < 3; where++)
                for (int mode = 0; mode < 2; mode++)
                    for (int64_t tokens = 1; tokens < 20; tokens += 3) {
                        const int64_t rows = 37, cols = 531, halves = kind == KIND_PHASE ? 2 : 1;
                        Layer layer = {kind, stages, rows, cols, where, mode, 50, nullptr, nullptr};
                        const int64_t bytes = rows * (cols + 3) * 2 * stages;  // more than any layout needs
                        uint8_t* codes = static_cast<uint8_t*>(malloc(bytes));
                        for (int64_t i = 0; i < bytes; i++) codes[i] = static_cast<uint8_t>(rand());
                        if (kind == KIND_REAL && stages == 2)  // ternary has no code 3
                            for (int64_t i = 0; i < bytes; i++) codes[i] &= ~(codes[i] << 1 & 0xaa);
                        const int64_t groups = stages * 4 * rows * cols;
                        float* scales = static_cast<float*>(malloc(groups * 4));
                        for (int64_t i = 0; i < groups; i++) scales[i] = 0.5f + static_cast<float>(rand()) / RAND_MAX;
                        uint32_t* words = static_cast<uint32_t*>(malloc(fairy2i_words(&layer) * 4));
                        fairy2i_pack(&layer, codes, words);
                        layer.codes = words, layer.scales = scales;
                        float* x = static_cast<float*>(malloc(tokens * cols * halves * 4));
                        for (int64_t i = 0; i < tokens * cols * halves; i++) x[i] = static_cast<float>(rand()) / RAND_MAX - 0.5f;
                        float* first = nullptr;
                        const char* name;
                        int32_t runs;
                        for (int32_t i = 0; (name = fairy2i_instruction_set(i, &runs)); i++) {
                            if (!runs || fairy2i_choose(name)) return printf("%s does not run\n", name), 1;
                            float* y = static_cast<float*>(malloc(tokens * rows * halves * 4));
                            const Layer* layers[] = {&layer};
                            void* outputs[] = {y};
                            const float* biases[] = {nullptr};
                            if (fairy2i_linear(1, layers, x, outputs, biases, tokens, DTYPE_F32, 2)) return 1;
                            if (!first) { first = y; continue; }
                            for (int64_t k = 0; k < tokens * rows * halves; k++)
                                if (!(fabsf(y[k] - first[k]) <= 2e-4f * (1 + fabsf(y[k]))))
                                    return printf("kind %d stages %d where %d mode %d: %g, %g\n", kind, stages, where, mode, y[k], first[k]), 1;
                            free(y), compared++;
                        }
                        free(first), free(codes), free(scales), free(words), free(x);
                    }
    printf("compared %d\n", compared);
    return compared ? 0 : 1;
}
