// The structs of a call from what Python hands over: addresses, sizes and strides, in the order of the struct's fields.
#pragma once

#include <cstdint>

#include "frozen_layers.h"
#include "packed_attention.h"
#include "precondition_accumulate.h"
#include "softmax_block.h"
#include "token_logprobs.h"
#include "unit_products.h"

namespace entropy_fast {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline TokenLogprobsForward token_logprobs_forward_call(Address logits, Address targets, Address logprob, Address lse,
                                                        Address entropy, int64_t rows, int64_t vocabulary,
                                                        int64_t row_stride, int64_t ignore_index,
                                                        ElementType element_type) {
    return {pointer<const void>(logits),
            pointer<const int64_t>(targets),
            pointer<void>(logprob),
            pointer<double>(lse),
            pointer<double>(entropy),
            rows,
            vocabulary,
            row_stride,
            ignore_index,
            element_type};
}

inline TokenLogprobsBackward token_logprobs_backward_call(Address logits, Address targets, Address lse, Address entropy,
                                                          Address grad_logprob, Address grad_lse, Address grad_entropy,
                                                          Address grad_logits, int64_t rows, int64_t vocabulary,
                                                          int64_t row_stride, int64_t grad_row_stride,
                                                          int64_t ignore_index, ElementType element_type) {
    return {pointer<const void>(logits),
            pointer<const int64_t>(targets),
            pointer<const double>(lse),
            pointer<const double>(entropy),
            pointer<const void>(grad_logprob),
            pointer<const double>(grad_lse),
            pointer<const double>(grad_entropy),
            pointer<void>(grad_logits),
            rows,
            vocabulary,
            row_stride,
            grad_row_stride,
            ignore_index,
            element_type};
}

inline SoftmaxBlock softmax_block_call(Address logits, Address entropy_weights, Address targets, Address state,
                                       int64_t rows, int64_t width, int64_t row_stride, int64_t first_token,
                                       double softcap, bool weights, ElementType element_type) {
    return {pointer<void>(logits),
            pointer<void>(entropy_weights),
            pointer<const int64_t>(targets),
            pointer<SoftmaxRow>(state),
            rows,
            width,
            row_stride,
            first_token,
            softcap,
            weights,
            element_type};
}

inline SumsOfBlocks sums_of_blocks_call(Address sums, Address entropy_sums, Address products, Address entropy_products,
                                        Address state, int64_t rows, int64_t width, ElementType element_type) {
    return {pointer<void>(sums),
            pointer<void>(entropy_sums),
            pointer<const void>(products),
            pointer<const void>(entropy_products),
            pointer<const SoftmaxRow>(state),
            rows,
            width,
            element_type};
}

inline PreconditionAccumulate precondition_accumulate_call(Address entries, Address factors, Address owners,
                                                           Address partial_dots, Address dots, int64_t tensors,
                                                           int64_t chunks, double x_scale, double g_scale,
                                                           bool update) {
    return {pointer<const AccumulateEntry>(entries),
            pointer<const AccumulateFactors>(factors),
            pointer<const int32_t>(owners),
            pointer<double>(partial_dots),
            pointer<double>(dots),
            tensors,
            chunks,
            x_scale,
            g_scale,
            update};
}

inline UnitProducts unit_products_call(Address narrow, Address wide, Address weights, Address runs, Address first_sums,
                                       Address second_sums, int64_t n_runs, int64_t narrow_columns,
                                       int64_t wide_columns, int64_t narrow_row, int64_t wide_row, int64_t weights_row,
                                       int64_t tokens_per_row, int64_t unit_stride, int64_t narrow_stride,
                                       int64_t wide_stride, ElementType element_type) {
    return {pointer<const void>(narrow),
            pointer<const void>(wide),
            pointer<const void>(weights),
            pointer<const UnitRun>(runs),
            pointer<void>(first_sums),
            pointer<void>(second_sums),
            n_runs,
            narrow_columns,
            wide_columns,
            narrow_row,
            wide_row,
            weights_row,
            tokens_per_row,
            unit_stride,
            narrow_stride,
            wide_stride,
            element_type};
}

inline RmsNormForward rms_norm_forward_call(Address x, Address weight, Address y, Address scales, int64_t rows,
                                            int64_t width, double epsilon, ElementType element_type) {
    return {pointer<const void>(x),
            pointer<const void>(weight),
            pointer<void>(y),
            pointer<void>(scales),
            rows,
            width,
            epsilon,
            element_type};
}

inline RmsNormBackward rms_norm_backward_call(Address dy, Address x, Address weight, Address scales, Address dx,
                                              int64_t rows, int64_t width, ElementType element_type) {
    return {pointer<const void>(dy),
            pointer<const void>(x),
            pointer<const void>(weight),
            pointer<const void>(scales),
            pointer<void>(dx),
            rows,
            width,
            element_type};
}

inline GatedSiluForward gated_silu_forward_call(Address gate, Address up, Address y, int64_t rows, int64_t width,
                                                ElementType element_type) {
    return {pointer<const void>(gate), pointer<const void>(up), pointer<void>(y), rows, width, element_type};
}

inline GatedSiluBackward gated_silu_backward_call(Address dy, Address gate, Address up, Address dgate, Address dup,
                                                  int64_t rows, int64_t width, ElementType element_type) {
    return {pointer<const void>(dy),
            pointer<const void>(gate),
            pointer<const void>(up),
            pointer<void>(dgate),
            pointer<void>(dup),
            rows,
            width,
            element_type};
}

inline PackedAttentionForward packed_attention_forward_call(
    Address query, int64_t query_head, int64_t query_token, Address key, int64_t key_head, int64_t key_token,
    Address value, int64_t value_head, int64_t value_token, Address prefix_key, int64_t prefix_key_head,
    int64_t prefix_key_token, Address prefix_value, int64_t prefix_value_head, int64_t prefix_value_token,
    Address sequences, Address sinks, int64_t n_sequences, int64_t tokens, int64_t prefix_tokens, int64_t heads,
    int64_t key_heads, int64_t size, int64_t window, double scale, Address output, ElementType element_type) {
    return {{{pointer<const void>(query), query_head, query_token},
             {pointer<const void>(key), key_head, key_token},
             {pointer<const void>(value), value_head, value_token},
             {pointer<const void>(prefix_key), prefix_key_head, prefix_key_token},
             {pointer<const void>(prefix_value), prefix_value_head, prefix_value_token},
             pointer<const AttentionSequence>(sequences),
             pointer<const void>(sinks),
             n_sequences,
             tokens,
             prefix_tokens,
             heads,
             key_heads,
             size,
             window,
             scale},
            pointer<void>(output),
            element_type};
}

inline PackedAttentionBackward packed_attention_backward_call(
    Address query, int64_t query_head, int64_t query_token, Address key, int64_t key_head, int64_t key_token,
    Address value, int64_t value_head, int64_t value_token, Address prefix_key, int64_t prefix_key_head,
    int64_t prefix_key_token, Address prefix_value, int64_t prefix_value_head, int64_t prefix_value_token,
    Address sequences, Address sinks, int64_t n_sequences, int64_t tokens, int64_t prefix_tokens, int64_t heads,
    int64_t key_heads, int64_t size, int64_t window, double scale, Address above, int64_t above_head,
    int64_t above_token, Address runs, Address weights, Address query_gradient, Address key_gradient,
    Address value_gradient, Address prefix_key_sums, Address prefix_value_sums, int64_t n_runs, int64_t n_weights,
    int64_t weight_rows, ElementType element_type) {
    const PackedAttentionForward forward = packed_attention_forward_call(
        query, query_head, query_token, key, key_head, key_token, value, value_head, value_token, prefix_key,
        prefix_key_head, prefix_key_token, prefix_value, prefix_value_head, prefix_value_token, sequences, sinks,
        n_sequences, tokens, prefix_tokens, heads, key_heads, size, window, scale, 0, element_type);
    return {forward.inputs,
            {pointer<const void>(above), above_head, above_token},
            pointer<const int64_t>(runs),
            pointer<const void>(weights),
            pointer<void>(query_gradient),
            pointer<void>(key_gradient),
            pointer<void>(value_gradient),
            pointer<void>(prefix_key_sums),
            pointer<void>(prefix_value_sums),
            n_runs,
            n_weights,
            weight_rows,
            element_type};
}

}  // namespace entropy_fast
