// The functions that the engine calls, with C names and plain types. Every call either finishes or says why not by its
// result; no exception leaves.
#include "layers.h"

struct Context {
    Context(const Model& model_, int num_threads) : model(model_), pool(num_threads), step(model, pool) {}
    Model model;
    Pool pool;
    Step step;
};

extern "C" {

int gp_abi() { return 2; }

int64_t gp_weight_bytes(int bits, int n, int k) { return weight_bytes(bits, n, k); }

void gp_pack_groups(int bits, int n, int k, const uint8_t* codes, const uint16_t* scales, const uint16_t* minima,
                    uint8_t* out) {
    pack_groups(bits, n, k, codes, scales, minima, out);
}

void gp_pack_floats(int bits, int n, int k, const void* values, uint8_t* out) { pack_floats(bits, n, k, values, out); }

void* gp_new(const Model* model, int num_threads) {
    try {
        return new Context(*model, num_threads);
    } catch (...) {
        return nullptr;
    }
}

// Of the cache that the layers' keys and values point into.
void gp_set_num_slots(void* context, int64_t num_slots) { static_cast<Context*>(context)->model.num_slots = num_slots; }

void gp_free(void* context) { delete static_cast<Context*>(context); }

void gp_embed(void* context, const int64_t* ids, int num_rows, float* out) {
    const Model& model = static_cast<Context*>(context)->model;
    for (int row = 0; row < num_rows; row++) {
        float* to = out + (int64_t)row * model.hidden_size;
        unpack_row(model.embedding, (int)ids[row], to);
        for (int i = 0; i < model.hidden_size; i++) to[i] *= model.embedding_scale;
    }
}

// 0, or 1 when there is no memory.
int gp_run(void* context, float* hidden, const Span* spans, int num_spans, int start, int end) {
    try {
        static_cast<Context*>(context)->step.run(hidden, spans, num_spans, start, end);
        return 0;
    } catch (...) {
        return 1;
    }
}

int gp_logits(void* context, const float* hidden, int num_rows, float* out) {
    try {
        static_cast<Context*>(context)->step.logits(hidden, num_rows, out);
        return 0;
    } catch (...) {
        return 1;
    }
}
}
