// What the node says of a model's layers, and of one step. Filled by native/abi.py: the order and types of the fields
// are the contract.
#pragma once

#include "weight.h"

struct Layer {
    Weight query, key, value, output, gate, up, down;
    const float *query_bias, *key_bias, *value_bias, *output_bias;  // may be null
    const float *norm_before_attention, *norm_after_attention;      // the second may be null
    const float *norm_before_mlp, *norm_after_mlp;                  // the second may be null
    const float *query_norm, *key_norm;                             // [head_dim], may be null
    uint16_t *keys, *values;                                        // [kv_heads][slots][head_dim]
    const float* inverse_frequencies;                               // [rotary_dim / 2]
    int32_t rotary_dim;
    float rotary_scale;
    int32_t window;     // 0: none
    int32_t rope_kind;  // layers of one kind share cosines and sines
};

struct Model {
    int32_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, num_layers;
    int32_t activation;  // 0 silu, 1 gelu with tanh
    float norm_epsilon, attention_scale, attention_softcap, embedding_scale, final_softcap;
    int64_t num_slots;
    Weight embedding, head;   // data null where this stage has none
    const float* final_norm;  // null likewise
    const Layer* layers;
};

// Consecutive rows of one session; the first stands at `position`, the first `num_prompt_tokens` are of its prompt.
struct Span {
    const int32_t* blocks;
    int32_t position;
    int32_t num_tokens;
    int32_t num_prompt_tokens;
    int32_t padding;
};
