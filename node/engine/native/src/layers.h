// The decoder layers of one stage over a batch of rows: all threads walk through the same phases, taking tasks of a
// phase as they are free, and meet at a barrier after each.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "amx.h"
#include "attention.h"
#include "matmul.h"
#include "model.h"
#include "pool.h"

constexpr int MAX_ROPE_KINDS = 2;

// Memory that grows and is kept from step to step.
template <typename T>
class Buffer {
   public:
    T* reserve(int64_t count) {
        if (count > count_) {
            data_.reset(static_cast<T*>(std::aligned_alloc(64, rounded_up(count * sizeof(T)))));
            count_ = data_ ? count : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_.get();
    }

   private:
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t count_ = 0;
};

class RowsBuffer {
   public:
    Rows reserve(int num_rows, int k) {
        const int64_t count = (int64_t)num_rows * k, groups = (int64_t)num_rows * (k / GROUP);
        return Rows{num_rows, k, values_.reserve(count), numbers_.reserve(groups * NUMBER_BYTES), scales_.reserve(groups), sums_.reserve(groups),
                    excess_.reserve(groups)};
    }

   private:
    Buffer<float> values_, scales_, sums_;
    Buffer<int8_t> numbers_;
    Buffer<int32_t> excess_;
};

static inline bool is_packed(const Weight& weight) { return weight.bits <= 8; }

static inline void rms_norm(const float* from, const float* weight, int size, float epsilon, float* to) {
    f32x16 squares = {};
    for (int at = 0; at < size; at += LANES) {
        const f32x16 value = load<f32x16>(from + at);
        squares = fma16(value, value, squares);
    }
    const float factor = 1.0f / std::sqrt(sum_of(squares) / size + epsilon);
    for (int at = 0; at < size; at += LANES)
        store(to + at, load<f32x16>(from + at) * factor * load<f32x16>(weight + at));
}

// exp for any sign, within the range where the result is a normal float.
static inline f32x16 silu(f32x16 x) {
    const f32x16 t = exp16(-max16(x, -x));
    const f32x16 sigmoid = (x < 0 ? t : splat(1.0f)) / (splat(1.0f) + t);
    return x * sigmoid;
}

static inline f32x16 gelu_tanh(f32x16 x) {
    const f32x16 inner = x * 0.7978845608028654f * fma16(x * x, splat(0.044715f), splat(1.0f));
    // gelu(x) = x * sigmoid(2 * inner)
    const f32x16 t = exp16(max16(inner, -inner) * -2.0f);
    return x * ((inner < 0 ? t : splat(1.0f)) / (splat(1.0f) + t));
}

class Step {
   public:
    Step(const Model& model, Pool& pool) : model_(model), pool_(pool) {}

    // Layers [start, end) over `hidden` [rows][hidden_size], in place.
    void run(float* hidden, const Span* spans, int num_spans, int start, int end) {
        hidden_ = hidden;
        spans_ = spans;
        num_spans_ = num_spans;
        start_ = start;
        end_ = end;
        prepare();
        pool_.run([](void* step, int thread) { static_cast<Step*>(step)->walk(thread); }, this);
    }

    void logits(const float* hidden, int num_rows, float* out) {
        hidden_ = const_cast<float*>(hidden);
        num_rows_ = num_rows;
        out_ = out;
        normed_ = normed_buffer_.reserve(num_rows, model_.hidden_size);
        pool_.run([](void* step, int) { static_cast<Step*>(step)->walk_logits(); }, this);
    }

   private:
    struct RowPlace {
        int span, position;
    };

    // Rows of one span that attend together.
    struct Attention {
        int first_row, num_rows;
    };

    void prepare() {
        places_.clear();
        attentions_.clear();
        const int num_queries = model_.num_heads / model_.num_kv_heads;
        const int rows_at_once = num_queries >= MAX_QUERIES ? 1 : MAX_QUERIES / num_queries;
        int longest = 0;
        for (int span = 0; span < num_spans_; span++) {
            const int num_tokens = spans_[span].num_tokens;
            for (int row = 0; row < num_tokens; row += rows_at_once) {
                const int left = num_tokens - row;
                attentions_.push_back({(int)places_.size() + row, left < rows_at_once ? left : rows_at_once});
            }
            for (int row = 0; row < num_tokens; row++) places_.push_back({span, spans_[span].position + row});
            longest = std::max(longest, spans_[span].position + num_tokens);
        }
        num_rows_ = (int)places_.size();
        num_parts_ = (longest + PART_TOKENS - 1) / PART_TOKENS;
        const int num_tasks = (int)attentions_.size() * model_.num_kv_heads;
        // Few long sequences are cut into parts, so that every thread has some.
        is_cut_ = num_parts_ > 1 && pool_.num_threads() > 1 && num_rows_ <= MAX_QUERIES &&
                  num_tasks < 8 * pool_.num_threads();
        if (is_cut_) partials_.reserve((int64_t)num_rows_ * model_.num_heads * num_parts_);
        const int query_size = model_.num_heads * model_.head_dim, kv_size = model_.num_kv_heads * model_.head_dim;
        normed_ = normed_buffer_.reserve(num_rows_, model_.hidden_size);
        attended_ = attended_buffer_.reserve(num_rows_, query_size);
        activated_ = activated_buffer_.reserve(num_rows_, model_.intermediate_size);
        queries_ = queries_buffer_.reserve((int64_t)num_rows_ * query_size);
        keys_ = keys_buffer_.reserve((int64_t)num_rows_ * kv_size);
        values_ = values_buffer_.reserve((int64_t)num_rows_ * kv_size);
        added_ = added_buffer_.reserve((int64_t)num_rows_ * model_.hidden_size);
        for (auto& table : rope_) table.reserve((int64_t)num_rows_ * model_.head_dim);
    }

    // The matrix unit is this thread's for as long as rows come in sixteens.
    class MatrixUnit {
       public:
        explicit MatrixUnit(bool is_used) : is_used_(is_used) {
            if (is_used_) configure_matrix_unit();
        }
        ~MatrixUnit() {
            if (is_used_) release_matrix_unit();
        }

       private:
        const bool is_used_;
    };

    bool uses_matrix_unit() const { return num_rows_ >= MATRIX_ROWS && has_matrix_unit(); }

    void walk(int thread) {
        const MatrixUnit unit(uses_matrix_unit());
        for (int layer = start_; layer < end_; layer++) fill_rope(layer, thread);
        pool_.barrier();
        for (int layer = start_; layer < end_; layer++) run_layer(model_.layers[layer]);
    }

    void run_layer(const Layer& layer) {
        norm_rows(layer.norm_before_attention, is_packed(layer.query) || is_packed(layer.key) || is_packed(layer.value));
        pool_.barrier();
        project_attention(layer);
        pool_.barrier();
        write_cache(layer);
        pool_.barrier();
        attend_rows(layer);
        pool_.barrier();
        if (is_cut_) {
            merge_parts();
            pool_.barrier();
        }
        if (is_packed(layer.output)) {
            round_rows(attended_);
            pool_.barrier();
        }
        project_back(layer.output, attended_, layer.output_bias, layer.norm_after_attention);
        pool_.barrier();
        if (layer.norm_after_attention) {
            add_normed(layer.norm_after_attention);
            pool_.barrier();
        }
        norm_rows(layer.norm_before_mlp, is_packed(layer.gate) || is_packed(layer.up));
        pool_.barrier();
        activate(layer);
        pool_.barrier();
        project_back(layer.down, activated_, nullptr, layer.norm_after_mlp);
        pool_.barrier();
        if (layer.norm_after_mlp) {
            add_normed(layer.norm_after_mlp);
            pool_.barrier();
        }
    }

    // Calls `task(i)` for the tasks this thread gets.
    template <typename Task>
    void each(int num_tasks, int at_once, Task task) {
        for (int first = pool_.take(at_once); first < num_tasks; first = pool_.take(at_once))
            for (int i = first; i < std::min(first + at_once, num_tasks); i++) task(i);
    }

    // Cosines and sines of a kind, at its first layer. Not by `each`: more than one kind is filled in this phase.
    void fill_rope(int index, int thread) {
        const Layer& layer = model_.layers[index];
        for (int earlier = start_; earlier < index; earlier++)
            if (model_.layers[earlier].rope_kind == layer.rope_kind) return;
        const int half = layer.rotary_dim / 2;
        float* table = rope_[layer.rope_kind].reserve(0);
        for (int row = thread; row < num_rows_; row += pool_.num_threads()) {
            float* cosines = table + (int64_t)row * model_.head_dim;
            for (int i = 0; i < half; i++) {
                const float angle = places_[row].position * layer.inverse_frequencies[i];
                cosines[i] = std::cos(angle) * layer.rotary_scale;
                cosines[half + i] = std::sin(angle) * layer.rotary_scale;
            }
        }
    }

    void norm_rows(const float* weight, bool with_numbers) {
        const int size = model_.hidden_size;
        each(num_rows_, 4, [&](int row) {
            rms_norm(hidden_ + (int64_t)row * size, weight, size, model_.norm_epsilon, normed_.row(row));
            if (with_numbers) normed_.round_groups(row, 0, size / GROUP);
        });
    }

    void round_rows(const Rows& rows) {
        each(num_rows_, 4, [&](int row) { rows.round_groups(row, 0, rows.k / GROUP); });
    }

    // One tile of outputs for every row: `put(row, lanes)`.
    template <typename Put>
    void multiply_tile(const Weight& weight, int tile, const Rows& rows, Put put) {
        f32x16 out[MATRIX_ROWS];
        int first = 0;
        if (is_packed(weight) && uses_matrix_unit())
            for (; first + MATRIX_ROWS <= num_rows_; first += MATRIX_ROWS) {
                multiply_matrix(weight, tile_of(weight, tile), rows, first, out);
                for (int row = 0; row < MATRIX_ROWS; row++) put(first + row, out[row]);
            }
        for (; first < num_rows_; first += MAX_ROWS_AT_ONCE) {
            const int count = std::min(MAX_ROWS_AT_ONCE, num_rows_ - first);
            multiply(weight, tile, rows, first, count, out);
            for (int row = 0; row < count; row++) put(first + row, out[row]);
        }
    }

    // `size` outputs a row, all of them whole tiles.
    void multiply_to(const Weight& weight, int tile, const Rows& rows, const float* bias, float* to, int size) {
        multiply_tile(weight, tile, rows, [&](int row, f32x16 lanes) {
            if (bias) lanes += load<f32x16>(bias + tile * LANES);
            store(to + (int64_t)row * size + tile * LANES, lanes);
        });
    }

    void project_attention(const Layer& layer) {
        const int query_size = model_.num_heads * model_.head_dim, kv_size = model_.num_kv_heads * model_.head_dim;
        const int num_query = query_size / LANES, num_kv = kv_size / LANES;
        each(num_query + 2 * num_kv, 2, [&](int tile) {
            if (tile < num_query)
                multiply_to(layer.query, tile, normed_, layer.query_bias, queries_, query_size);
            else if (tile < num_query + num_kv)
                multiply_to(layer.key, tile - num_query, normed_, layer.key_bias, keys_, kv_size);
            else
                multiply_to(layer.value, tile - num_query - num_kv, normed_, layer.value_bias, values_, kv_size);
        });
    }

    void turn(float* head, const float* norm, const Layer& layer, int row, float scale) {
        if (norm) rms_norm(head, norm, model_.head_dim, model_.norm_epsilon, head);
        const int half = layer.rotary_dim / 2;
        const float* cosines = rope_[layer.rope_kind].reserve(0) + (int64_t)row * model_.head_dim;
        const float* sines = cosines + half;
        for (int i = 0; i < half; i++) {
            const float low = head[i], high = head[half + i];
            head[i] = low * cosines[i] - high * sines[i];
            head[half + i] = high * cosines[i] + low * sines[i];
        }
        if (scale != 1.0f)
            for (int i = 0; i < model_.head_dim; i++) head[i] *= scale;
    }

    void write_cache(const Layer& layer) {
        const int dim = model_.head_dim, num_kv_heads = model_.num_kv_heads;
        const int group = model_.num_heads / num_kv_heads;
        each(num_rows_ * num_kv_heads, 1, [&](int task) {
            const int row = task / num_kv_heads, head = task % num_kv_heads;
            for (int query = head * group; query < (head + 1) * group; query++)
                turn(queries_ + ((int64_t)row * model_.num_heads + query) * dim, layer.query_norm, layer, row,
                     model_.attention_scale);
            float* key = keys_ + ((int64_t)row * num_kv_heads + head) * dim;
            turn(key, layer.key_norm, layer, row, 1.0f);
            const float* value = values_ + ((int64_t)row * num_kv_heads + head) * dim;
            const RowPlace place = places_[row];
            const int64_t block = spans_[place.span].blocks[place.position / BLOCK_TOKENS];
            const int lane = place.position % BLOCK_TOKENS;
            const int64_t at = (head * model_.num_slots + block * BLOCK_TOKENS) * dim;
            uint16_t* key_block = layer.keys + at;
            uint16_t* values = layer.values + at + (int64_t)lane * dim;
            for (int d = 0; d < dim; d++) key_block[d * BLOCK_TOKENS + lane] = float_to_half(key[d]);
            for (int d = 0; d < dim; d++) values[d] = float_to_half(value[d]);
        });
    }

    HeadCache cache_of(const Layer& layer, int head, int span) const {
        const int64_t at = head * model_.num_slots * model_.head_dim;
        return {layer.keys + at, layer.values + at, spans_[span].blocks, model_.head_dim, model_.attention_softcap};
    }

    Query query_of(const Layer& layer, int row, int head) const {
        const int position = places_[row].position;
        const int begin = layer.window > 0 && position >= layer.window ? position - layer.window + 1 : 0;
        return {queries_ + ((int64_t)row * model_.num_heads + head) * model_.head_dim, begin, position + 1};
    }

    void attend_rows(const Layer& layer) {
        const int num_kv_heads = model_.num_kv_heads, num_parts = is_cut_ ? num_parts_ : 1;
        each((int)attentions_.size() * num_kv_heads * num_parts, 1, [&](int task) {
            const int part = task % num_parts, head = task / num_parts % num_kv_heads;
            const Attention& attention = attentions_[task / num_parts / num_kv_heads];
            const int group = model_.num_heads / num_kv_heads;
            int places[MAX_QUERIES][2];
            Query queries[MAX_QUERIES];
            const HeadCache cache = cache_of(layer, head, places_[attention.first_row].span);
            int count = 0;
            for (int row = attention.first_row; row < attention.first_row + attention.num_rows; row++)
                for (int query = head * group; query < (head + 1) * group; query++) {
                    places[count][0] = row;
                    places[count][1] = query;
                    queries[count++] = query_of(layer, row, query);
                    const bool is_last = row + 1 == attention.first_row + attention.num_rows &&
                                         query + 1 == (head + 1) * group;
                    if (count < MAX_QUERIES && !is_last) continue;
                    if (is_cut_)
                        attend_one_part(cache, queries, places, count, part);
                    else
                        attend_all_parts(cache, queries, places, count);
                    count = 0;
                }
        });
    }

    Partial& partial_of(int row, int head, int part) {
        return partials_.reserve(0)[((int64_t)row * model_.num_heads + head) * num_parts_ + part];
    }

    void attend_one_part(const HeadCache& cache, const Query* queries, const int (*places)[2], int count, int part) {
        Partial partials[MAX_QUERIES];
        attend(cache, queries, count, part * PART_TOKENS, partials);
        for (int query = 0; query < count; query++)
            partial_of(places[query][0], places[query][1], part) = partials[query];
    }

    void attend_all_parts(const HeadCache& cache, const Query* queries, const int (*places)[2], int count) {
        Partial totals[MAX_QUERIES], partials[MAX_QUERIES];
        int begin = queries[0].begin, end = queries[0].end;
        for (int query = 0; query < count; query++) {
            totals[query].clear();
            begin = std::min(begin, queries[query].begin);
            end = std::max(end, queries[query].end);
        }
        for (int base = begin / PART_TOKENS * PART_TOKENS; base < end; base += PART_TOKENS) {
            attend(cache, queries, count, base, partials);
            for (int query = 0; query < count; query++) totals[query].merge(partials[query], model_.head_dim);
        }
        for (int query = 0; query < count; query++) put_attended(places[query][0], places[query][1], totals[query]);
    }

    void put_attended(int row, int head, const Partial& total) {
        float* to = attended_.row(row) + head * model_.head_dim;
        const float factor = 1.0f / total.sum;
        for (int at = 0; at < model_.head_dim; at += LANES)
            store(to + at, load<f32x16>(total.values + at) * factor);
    }

    void merge_parts() {
        each(num_rows_ * model_.num_heads, 2, [&](int task) {
            const int row = task / model_.num_heads, head = task % model_.num_heads;
            Partial total;
            total.clear();
            for (int part = 0; part < num_parts_; part++)
                total.merge(partial_of(row, head, part), model_.head_dim);
            put_attended(row, head, total);
        });
    }

    // Adds to the rows themselves, or where a norm comes between, leaves the product in `added_`.
    void project_back(const Weight& weight, const Rows& rows, const float* bias, const float* norm) {
        const int size = model_.hidden_size;
        each(size / LANES, 2, [&](int tile) {
            multiply_tile(weight, tile, rows, [&](int row, f32x16 lanes) {
                if (bias) lanes += load<f32x16>(bias + tile * LANES);
                const int64_t at = (int64_t)row * size + tile * LANES;
                if (norm)
                    store(added_ + at, lanes);
                else
                    store(hidden_ + at, load<f32x16>(hidden_ + at) + lanes);
            });
        });
    }

    void add_normed(const float* norm) {
        const int size = model_.hidden_size;
        each(num_rows_, 4, [&](int row) {
            float* added = added_ + (int64_t)row * size;
            float* hidden = hidden_ + (int64_t)row * size;
            rms_norm(added, norm, size, model_.norm_epsilon, added);
            for (int at = 0; at < size; at += LANES)
                store(hidden + at, load<f32x16>(hidden + at) + load<f32x16>(added + at));
        });
    }

    // Two tiles a task: 32 outputs, one group to be rounded for the next product.
    void activate(const Layer& layer) {
        each(model_.intermediate_size / GROUP, 1, [&](int group) {
            for (int half = 0; half < 2; half++) {
                const int tile = 2 * group + half;
                multiply_to(layer.up, tile, normed_, nullptr, activated_.values, model_.intermediate_size);
                multiply_tile(layer.gate, tile, normed_, [&](int row, f32x16 gate) {
                    float* to = activated_.row(row) + tile * LANES;
                    const f32x16 active = model_.activation == 0 ? silu(gate) : gelu_tanh(gate);
                    store(to, load<f32x16>(to) * active);
                });
            }
            if (is_packed(layer.down))
                for (int row = 0; row < num_rows_; row++) activated_.round_groups(row, group, group + 1);
        });
    }

    void walk_logits() {
        const MatrixUnit unit(uses_matrix_unit());
        norm_rows(model_.final_norm, is_packed(model_.head));
        pool_.barrier();
        const int size = model_.head.n;
        each(num_tiles(size), 8, [&](int tile) {
            multiply_tile(model_.head, tile, normed_, [&](int row, f32x16 lanes) {
                if (model_.final_softcap > 0) lanes = capped(lanes, model_.final_softcap);
                const int count = std::min(LANES, size - tile * LANES);
                std::memcpy(out_ + (int64_t)row * size + tile * LANES, &lanes, count * sizeof(float));
            });
        });
    }

    const Model& model_;
    Pool& pool_;
    float* hidden_ = nullptr;
    float* out_ = nullptr;
    const Span* spans_ = nullptr;
    int num_spans_ = 0, start_ = 0, end_ = 0, num_rows_ = 0, num_parts_ = 0;
    bool is_cut_ = false;
    std::vector<RowPlace> places_;
    std::vector<Attention> attentions_;
    RowsBuffer normed_buffer_, attended_buffer_, activated_buffer_;
    Rows normed_, attended_, activated_;
    Buffer<float> queries_buffer_, keys_buffer_, values_buffer_, added_buffer_, rope_[MAX_ROPE_KINDS];
    Buffer<Partial> partials_;
    float *queries_ = nullptr, *keys_ = nullptr, *values_ = nullptr, *added_ = nullptr;
};
