// The decoder layers of one stage over a batch of rows: all threads walk through the same phases, taking tasks of a
// phase as they are free, and meet at a barrier after each.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "matmul.h"
#include "model.h"
#include "pool.h"
#include "prompt_attention.h"

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

// Rows as floats, as whole numbers, and those of prompts in two parts.
struct Input {
    Rows rows;
    Parts parts;
};

class InputBuffer {
   public:
    Input reserve(int num_rows, int k, bool with_parts) {
        const int64_t count = (int64_t)num_rows * k, groups = (int64_t)num_rows * (k / GROUP);
        Rows rows{num_rows,
                  k,
                  values_.reserve(count),
                  numbers_.reserve(groups * NUMBER_BYTES),
                  scales_.reserve(groups),
                  sums_.reserve(groups),
                  excess_.reserve(groups)};
        if (!with_parts) return {rows, {}};
        const int64_t num_part_rows = num_rows + BLOCK_ROWS;
        return {rows, {(int)num_part_rows, high_.reserve(num_part_rows * k), low_.reserve(num_part_rows * k)}};
    }

   private:
    Buffer<float> values_, scales_, sums_;
    Buffer<int8_t> numbers_;
    Buffer<int32_t> excess_;
    Buffer<uint16_t> high_, low_;
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
    Step(const Model& model, Pool& pool) : model_(model), pool_(pool), prompt_attentions_(pool.num_threads()) {}

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
        runs_.assign({{0, num_rows, false}});
        normed_ = normed_buffer_.reserve(num_rows, model_.hidden_size, false);
        pool_.run([](void* step, int) { static_cast<Step*>(step)->walk_logits(); }, this);
    }

   private:
    struct RowPlace {
        int span, position;
    };

    // Rows of one span that attend together; the first is the `number`th of all such rows.
    struct Attention {
        int first_row, num_rows, number;
    };

    // Queries [first, last) of a span's prompt rows, counted row by row and head by head within a group.
    struct PromptTask {
        int first_row, first, last;
    };

    void prepare() {
        places_.clear();
        attentions_.clear();
        prompt_tasks_.clear();
        runs_.clear();
        const int num_queries = model_.num_heads / model_.num_kv_heads;
        const int rows_at_once = num_queries >= MAX_QUERIES ? 1 : MAX_QUERIES / num_queries;
        const bool can_attend = PromptAttention::can(model_.head_dim);
        int longest = 0, num_exact_rows = 0;
        for (int span = 0; span < num_spans_; span++) {
            const int num_tokens = spans_[span].num_tokens;
            const int num_prompt_rows = has_bfloat_unit() ? std::min(spans_[span].num_prompt_tokens, num_tokens) : 0;
            const int num_prompt_queries = can_attend ? num_prompt_rows * num_queries : 0;
            for (int first = 0; first < num_prompt_queries; first += MAX_TASK_QUERIES)
                prompt_tasks_.push_back(
                    {(int)places_.size(), first, std::min(first + MAX_TASK_QUERIES, num_prompt_queries)});
            for (int row = can_attend ? num_prompt_rows : 0; row < num_tokens; row += rows_at_once) {
                const int left = num_tokens - row;
                const int count = left < rows_at_once ? left : rows_at_once;
                attentions_.push_back({(int)places_.size() + row, count, num_exact_rows});
                num_exact_rows += count;
            }
            add_run((int)places_.size(), num_prompt_rows, true);
            add_run((int)places_.size() + num_prompt_rows, num_tokens - num_prompt_rows, false);
            for (int row = 0; row < num_tokens; row++) places_.push_back({span, spans_[span].position + row});
            const bool is_exact = !can_attend || num_prompt_rows < num_tokens;
            if (is_exact) longest = std::max(longest, spans_[span].position + num_tokens);
        }
        num_rows_ = (int)places_.size();
        num_parts_ = (longest + PART_TOKENS - 1) / PART_TOKENS;
        const int num_tasks = (int)attentions_.size() * model_.num_kv_heads;
        // Few long sequences are cut into parts, so that every thread has some.
        is_cut_ = num_parts_ > 1 && pool_.num_threads() > 1 && num_exact_rows <= MAX_QUERIES &&
                  num_tasks < 8 * pool_.num_threads();
        if (is_cut_) partials_.reserve((int64_t)num_exact_rows * model_.num_heads * num_parts_);
        const int query_size = model_.num_heads * model_.head_dim, kv_size = model_.num_kv_heads * model_.head_dim;
        const bool has_prompts = std::any_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.is_prompt; });
        normed_ = normed_buffer_.reserve(num_rows_, model_.hidden_size, has_prompts);
        attended_ = attended_buffer_.reserve(num_rows_, query_size, has_prompts);
        activated_ = activated_buffer_.reserve(num_rows_, model_.intermediate_size, has_prompts);
        for (auto& attention : prompt_attentions_)
            if (!prompt_tasks_.empty()) attention.reserve(model_.head_dim);
        if (has_prompts) reserve_bfloats(std::max({model_.hidden_size, query_size, model_.intermediate_size}));
        queries_ = queries_buffer_.reserve((int64_t)num_rows_ * query_size);
        keys_ = keys_buffer_.reserve((int64_t)num_rows_ * kv_size);
        values_ = values_buffer_.reserve((int64_t)num_rows_ * kv_size);
        added_ = added_buffer_.reserve((int64_t)num_rows_ * model_.hidden_size);
        for (auto& table : rope_) table.reserve((int64_t)num_rows_ * model_.head_dim);
    }

    // Rows [first, last) that stand together and are multiplied in one way.
    struct Run {
        int first, last;
        bool is_prompt;
    };

    void add_run(int first, int num_rows, bool is_prompt) {
        if (!num_rows) return;
        if (!runs_.empty() && runs_.back().is_prompt == is_prompt)
            runs_.back().last = first + num_rows;
        else
            runs_.push_back({first, first + num_rows, is_prompt});
    }

    void reserve_bfloats(int k) {
        bfloats_.resize(pool_.num_threads());
        for (auto& buffer : bfloats_) buffer.reserve((int64_t)PAIR_TILES * LANES * k);
    }

    // What a thread has of the matrix unit: set up when first needed and when the shapes change, given back at the end.
    class MatrixUnit {
       public:
        ~MatrixUnit() {
            if (shapes_ != NONE) release_matrix_unit();
        }

        void use_numbers() { use(NUMBERS); }

        void use_bfloats() { use(BFLOATS); }

       private:
        enum Shapes { NONE, NUMBERS, BFLOATS };

        void use(Shapes shapes) {
            if (shapes_ == shapes) return;
            if (shapes == NUMBERS)
                configure_matrix_unit();
            else
                configure_bfloat_unit();
            shapes_ = shapes;
        }

        Shapes shapes_ = NONE;
    };

    // A thread's own, while it walks.
    struct Worker {
        int thread = 0;
        MatrixUnit unit;
        uint16_t* bfloats = nullptr;
    };

    void walk(int thread) {
        Worker worker;
        worker.thread = thread;
        if (normed_.parts.high) worker.bfloats = bfloats_[thread].reserve(0);
        for (int layer = start_; layer < end_; layer++) fill_rope(layer, thread);
        pool_.barrier();
        for (int layer = start_; layer < end_; layer++) run_layer(worker, model_.layers[layer]);
    }

    void run_layer(Worker& worker, const Layer& layer) {
        norm_rows(layer.norm_before_attention, is_packed(layer.query) || is_packed(layer.key) || is_packed(layer.value));
        pool_.barrier();
        project_attention(worker, layer);
        pool_.barrier();
        write_cache(layer);
        pool_.barrier();
        attend_rows(worker, layer);
        pool_.barrier();
        if (is_cut_) {
            merge_parts();
            pool_.barrier();
        }
        if (is_packed(layer.output) || attended_.parts.high) {
            each(num_rows_, 4, [&](int row) { round_row(attended_, row, is_packed(layer.output)); });
            pool_.barrier();
        }
        project_back(worker, layer.output, attended_, layer.output_bias, layer.norm_after_attention);
        pool_.barrier();
        if (layer.norm_after_attention) {
            add_normed(layer.norm_after_attention);
            pool_.barrier();
        }
        norm_rows(layer.norm_before_mlp, is_packed(layer.gate) || is_packed(layer.up));
        pool_.barrier();
        activate(worker, layer);
        pool_.barrier();
        project_back(worker, layer.down, activated_, nullptr, layer.norm_after_mlp);
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
            rms_norm(hidden_ + (int64_t)row * size, weight, size, model_.norm_epsilon, normed_.rows.row(row));
            round_row(normed_, row, with_numbers);
        });
    }

    bool is_prompt(int row) const {
        for (const Run& run : runs_)
            if (row < run.last) return run.is_prompt;
        return false;
    }

    void round_row(const Input& input, int row, bool with_numbers) const {
        round_groups(input, row, is_prompt(row), with_numbers, 0, input.rows.k / GROUP);
    }

    // The forms in which products take the row, beside floats.
    static void round_groups(const Input& input, int row, bool is_prompt, bool with_numbers, int first, int last) {
        if (!is_prompt) {
            if (with_numbers) input.rows.round_groups(row, first, last);
            return;
        }
        for (int group = first; group < last; group++) {
            const int64_t at = input.parts.at(group, row);
            split_group(input.rows.row(row) + group * GROUP, input.parts.high + at, input.parts.low + at);
        }
    }

    // `count` neighbouring tiles of outputs, one or two, for every row: `put(row, tile, lanes)`.
    template <typename Put>
    void multiply_tiles(Worker& worker, const Weight& weight, int tile, int count, const Input& input, Put put) {
        for (const Run& run : runs_)
            if (run.is_prompt && weight.bits <= 16)
                multiply_prompt(worker, weight, tile, count, input, run, put);
            else
                for (int i = tile; i < tile + count; i++) multiply_run(worker, weight, i, input.rows, run, put);
    }

    template <typename Put>
    void multiply_run(Worker& worker, const Weight& weight, int tile, const Rows& rows, const Run& run, Put put) {
        f32x16 out[MATRIX_ROWS];
        int first = run.first;
        if (is_packed(weight) && run.last - first >= MATRIX_ROWS && has_matrix_unit()) {
            worker.unit.use_numbers();
            for (; first + MATRIX_ROWS <= run.last; first += MATRIX_ROWS) {
                multiply_matrix(weight, tile_of(weight, tile), rows, first, out);
                for (int row = 0; row < MATRIX_ROWS; row++) put(first + row, tile, out[row]);
            }
        }
        for (; first < run.last; first += MAX_ROWS_AT_ONCE) {
            const int count = std::min(MAX_ROWS_AT_ONCE, run.last - first);
            multiply(weight, tile, rows, first, count, out);
            for (int row = 0; row < count; row++) put(first + row, tile, out[row]);
        }
    }

    template <typename Put>
    void multiply_prompt(Worker& worker, const Weight& weight, int tile, int count, const Input& input, const Run& run,
                         Put put) {
        f32x16 out[PAIR_TILES * BLOCK_ROWS];
        for (int i = 0; i < count; i++)
            bfloats_of_tile(weight, tile + i, worker.bfloats + (int64_t)i * LANES * weight.k);
        worker.unit.use_bfloats();
        for (int first = run.first; first < run.last; first += BLOCK_ROWS) {
            multiply_block(worker.bfloats, weight.k, input.parts, first, out);
            const int num_rows = std::min(BLOCK_ROWS, run.last - first);
            for (int i = 0; i < count; i++)
                for (int row = 0; row < num_rows; row++) put(first + row, tile + i, out[i * BLOCK_ROWS + row]);
        }
    }

    // The `pair`th two of the tiles of [.., size] outputs, all of them whole tiles.
    void multiply_to(Worker& worker, const Weight& weight, int pair, const Input& input, const float* bias, float* to,
                     int size) {
        const int count = std::min(PAIR_TILES, size / LANES - PAIR_TILES * pair);
        multiply_tiles(worker, weight, PAIR_TILES * pair, count, input, [&](int row, int tile, f32x16 lanes) {
            if (bias) lanes += load<f32x16>(bias + tile * LANES);
            store(to + (int64_t)row * size + tile * LANES, lanes);
        });
    }

    static int num_pairs(int size) { return (size / LANES + PAIR_TILES - 1) / PAIR_TILES; }

    void project_attention(Worker& worker, const Layer& layer) {
        const int query_size = model_.num_heads * model_.head_dim, kv_size = model_.num_kv_heads * model_.head_dim;
        const int num_query = num_pairs(query_size), num_kv = num_pairs(kv_size);
        each(num_query + 2 * num_kv, 1, [&](int pair) {
            if (pair < num_query)
                multiply_to(worker, layer.query, pair, normed_, layer.query_bias, queries_, query_size);
            else if (pair < num_query + num_kv)
                multiply_to(worker, layer.key, pair - num_query, normed_, layer.key_bias, keys_, kv_size);
            else
                multiply_to(worker, layer.value, pair - num_query - num_kv, normed_, layer.value_bias, values_, kv_size);
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

    // Prompts first: their tasks are long.
    void attend_rows(Worker& worker, const Layer& layer) {
        const int num_kv_heads = model_.num_kv_heads, num_parts = is_cut_ ? num_parts_ : 1;
        const int num_prompt_tasks = (int)prompt_tasks_.size() * num_kv_heads;
        each(num_prompt_tasks + (int)attentions_.size() * num_kv_heads * num_parts, 1, [&](int number) {
            if (number < num_prompt_tasks)
                return attend_prompt(worker, layer, prompt_tasks_[number / num_kv_heads], number % num_kv_heads);
            const int task = number - num_prompt_tasks;
            const int part = task % num_parts, head = task / num_parts % num_kv_heads;
            const Attention& attention = attentions_[task / num_parts / num_kv_heads];
            const int group = model_.num_heads / num_kv_heads;
            int places[MAX_QUERIES][2];
            Query queries[MAX_QUERIES];
            const HeadCache cache = cache_of(layer, head, places_[attention.first_row].span);
            const int before = attention.first_row - attention.number;
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
                        attend_one_part(cache, queries, places, count, part, before);
                    else
                        attend_all_parts(cache, queries, places, count);
                    count = 0;
                }
        });
    }

    void attend_prompt(Worker& worker, const Layer& layer, const PromptTask& task, int head) {
        const int group = model_.num_heads / model_.num_kv_heads;
        const auto row_of = [&](int query) { return task.first_row + query / group; };
        const auto head_of = [&](int query) { return head * group + query % group; };
        Query queries[MAX_TASK_QUERIES];
        for (int query = task.first; query < task.last; query++)
            queries[query - task.first] = query_of(layer, row_of(query), head_of(query));
        worker.unit.use_bfloats();
        const HeadCache cache = cache_of(layer, head, places_[task.first_row].span);
        prompt_attentions_[worker.thread].attend(cache, queries, task.last - task.first, [&](int at, const Partial& total) {
            put_attended(row_of(task.first + at), head_of(task.first + at), total);
        });
    }

    // Of the `number`th row that attends exactly.
    Partial& partial_of(int number, int head, int part) {
        return partials_.reserve(0)[((int64_t)number * model_.num_heads + head) * num_parts_ + part];
    }

    // `before` rows in front of these attend elsewhere.
    void attend_one_part(const HeadCache& cache, const Query* queries, const int (*places)[2], int count, int part,
                         int before) {
        Partial partials[MAX_QUERIES];
        attend(cache, queries, count, part * PART_TOKENS, partials);
        for (int query = 0; query < count; query++)
            partial_of(places[query][0] - before, places[query][1], part) = partials[query];
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
        float* to = attended_.rows.row(row) + head * model_.head_dim;
        const float factor = 1.0f / total.sum;
        for (int at = 0; at < model_.head_dim; at += LANES)
            store(to + at, load<f32x16>(total.values + at) * factor);
    }

    void merge_parts() {
        each((int)attentions_.size() * model_.num_heads, 2, [&](int task) {
            const Attention& attention = attentions_[task / model_.num_heads];
            const int head = task % model_.num_heads;
            for (int i = 0; i < attention.num_rows; i++) {
                Partial total;
                total.clear();
                for (int part = 0; part < num_parts_; part++)
                    total.merge(partial_of(attention.number + i, head, part), model_.head_dim);
                put_attended(attention.first_row + i, head, total);
            }
        });
    }

    // Adds to the rows themselves, or where a norm comes between, leaves the product in `added_`.
    void project_back(Worker& worker, const Weight& weight, const Input& input, const float* bias, const float* norm) {
        const int size = model_.hidden_size;
        each(num_pairs(size), 1, [&](int pair) {
            const int count = std::min(PAIR_TILES, size / LANES - PAIR_TILES * pair);
            multiply_tiles(worker, weight, PAIR_TILES * pair, count, input, [&](int row, int tile, f32x16 lanes) {
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
    void activate(Worker& worker, const Layer& layer) {
        each(model_.intermediate_size / GROUP, 1, [&](int group) {
            const Rows& rows = activated_.rows;
            multiply_to(worker, layer.up, group, normed_, nullptr, rows.values, model_.intermediate_size);
            multiply_tiles(worker, layer.gate, PAIR_TILES * group, PAIR_TILES, normed_,
                           [&](int row, int tile, f32x16 gate) {
                               float* to = rows.row(row) + tile * LANES;
                               const f32x16 active = model_.activation == 0 ? silu(gate) : gelu_tanh(gate);
                               store(to, load<f32x16>(to) * active);
                           });
            for (const Run& run : runs_)
                for (int row = run.first; row < run.last; row++)
                    round_groups(activated_, row, run.is_prompt, is_packed(layer.down), group, group + 1);
        });
    }

    void walk_logits() {
        Worker worker;
        norm_rows(model_.final_norm, is_packed(model_.head));
        pool_.barrier();
        const int size = model_.head.n;
        each(num_tiles(size), 8, [&](int tile) {
            multiply_tiles(worker, model_.head, tile, 1, normed_, [&](int row, int, f32x16 lanes) {
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
    std::vector<PromptTask> prompt_tasks_;
    std::vector<PromptAttention> prompt_attentions_;
    std::vector<Run> runs_;
    std::vector<Buffer<uint16_t>> bfloats_;
    InputBuffer normed_buffer_, attended_buffer_, activated_buffer_;
    Input normed_, attended_, activated_;
    Buffer<float> queries_buffer_, keys_buffer_, values_buffer_, added_buffer_, rope_[MAX_ROPE_KINDS];
    Buffer<Partial> partials_;
    float *queries_ = nullptr, *keys_ = nullptr, *values_ = nullptr, *added_ = nullptr;
};
