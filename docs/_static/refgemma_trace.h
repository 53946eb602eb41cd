/* Write a trace for `refgemma check`: a safetensors file of named tensors. One header in C99, also C++, no dependency.
 *
 *     refgemma_trace trace = {0};
 *     refgemma_trace_metadata(&trace, "dtype", "float32");
 *     refgemma_trace_add(&trace, "logits", "F32", 3, (const size_t[]){1, seq, vocab}, numbers);
 *     if (refgemma_trace_save(&trace, "port.safetensors")) fprintf(stderr, "%s\n", trace.error);
 *     refgemma_trace_free(&trace);
 *
 * Numbers are copied: row by row, little endian. After an error all calls do nothing, and `error` has the first one.
 * Copyright 2026 The refgemma authors. SPDX-License-Identifier: Apache-2.0
 */
#ifndef REFGEMMA_TRACE_H
#define REFGEMMA_TRACE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char *bytes;
    size_t size, room;
} refgemma_buffer;

typedef struct {
    refgemma_buffer metadata, tensors, data; /* the header in two parts, and the numbers */
    char error[200];                         /* empty if all is well */
} refgemma_trace;

static inline void refgemma_put(refgemma_trace *trace, refgemma_buffer *to, const void *bytes, size_t size) {
    if (trace->error[0] || size == 0) return;
    if (to->size + size > to->room) {
        size_t room = 2 * to->room > to->size + size ? 2 * to->room : to->size + size;
        char *moved = (char *)realloc(to->bytes, room);
        if (!moved) {
            snprintf(trace->error, sizeof trace->error, "no memory for %zu bytes", room);
            return;
        }
        to->bytes = moved;
        to->room = room;
    }
    memcpy(to->bytes + to->size, bytes, size);
    to->size += size;
}

static inline void refgemma_put_text(refgemma_trace *trace, refgemma_buffer *to, const char *text) {
    refgemma_put(trace, to, text, strlen(text));
}

static inline void refgemma_put_quoted(refgemma_trace *trace, refgemma_buffer *to, const char *text) {
    char escaped[8];
    refgemma_put_text(trace, to, "\"");
    for (; *text; ++text) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            snprintf(escaped, sizeof escaped, "\\%c", c);
        else
            snprintf(escaped, sizeof escaped, c < 32 ? "\\u%04x" : "%c", c);
        refgemma_put_text(trace, to, escaped);
    }
    refgemma_put_text(trace, to, "\"");
}

/* Add a text, such as the "dtype" of the computation or the name of the "engine". */
static inline void refgemma_trace_metadata(refgemma_trace *trace, const char *key, const char *value) {
    if (trace->metadata.size) refgemma_put_text(trace, &trace->metadata, ",");
    refgemma_put_quoted(trace, &trace->metadata, key);
    refgemma_put_text(trace, &trace->metadata, ":");
    refgemma_put_quoted(trace, &trace->metadata, value);
}

/* Add a tensor of `rank` axes; `dtype` is I64, I32, F64, F32, BF16 or F16. */
static inline void refgemma_trace_add(refgemma_trace *trace, const char *name, const char *dtype, size_t rank,
                                      const size_t *shape, const void *numbers) {
    size_t bits = 0, size, axis;
    char text[64];
    if (!strcmp(dtype, "I64") || !strcmp(dtype, "F64")) bits = 64;
    if (!strcmp(dtype, "I32") || !strcmp(dtype, "F32")) bits = 32;
    if (!strcmp(dtype, "BF16") || !strcmp(dtype, "F16")) bits = 16;
    if (!bits && !trace->error[0]) {
        snprintf(trace->error, sizeof trace->error, "%.80s: unknown dtype %.20s", name, dtype);
        return;
    }
    size = bits / 8;
    refgemma_put_text(trace, &trace->tensors, ",");
    refgemma_put_quoted(trace, &trace->tensors, name);
    refgemma_put_text(trace, &trace->tensors, ":{\"dtype\":\"");
    refgemma_put_text(trace, &trace->tensors, dtype);
    refgemma_put_text(trace, &trace->tensors, "\",\"shape\":[");
    for (axis = 0; axis < rank; ++axis) {
        size *= shape[axis];
        snprintf(text, sizeof text, axis ? ",%zu" : "%zu", shape[axis]);
        refgemma_put_text(trace, &trace->tensors, text);
    }
    snprintf(text, sizeof text, "],\"data_offsets\":[%zu,%zu]}", trace->data.size, trace->data.size + size);
    refgemma_put_text(trace, &trace->tensors, text);
    refgemma_put(trace, &trace->data, numbers, size);
}

static inline void refgemma_write(refgemma_trace *trace, FILE *file, const void *bytes, size_t size) {
    if (!trace->error[0] && size && fwrite(bytes, 1, size, file) != size)
        snprintf(trace->error, sizeof trace->error, "the trace cannot be written; is the disk full?");
}

/* Write the file; return 0, or 1 if `trace->error` has a message. */
static inline int refgemma_trace_save(refgemma_trace *trace, const char *path) {
    const char *before = "{\"__metadata__\":{", *spaces = "       ";
    size_t size = strlen(before) + trace->metadata.size + 1 + trace->tensors.size + 1, padding = (8 - size % 8) % 8;
    uint64_t header = size + padding;
    unsigned char length[8];
    FILE *file;
    int n;
    if (trace->error[0]) return 1;
    file = fopen(path, "wb");
    if (!file) {
        snprintf(trace->error, sizeof trace->error, "%.150s: cannot be opened", path);
        return 1;
    }
    for (n = 0; n < 8; ++n) length[n] = (unsigned char)(header >> (8 * n));
    refgemma_write(trace, file, length, 8);
    refgemma_write(trace, file, before, strlen(before));
    refgemma_write(trace, file, trace->metadata.bytes, trace->metadata.size);
    refgemma_write(trace, file, "}", 1);
    refgemma_write(trace, file, trace->tensors.bytes, trace->tensors.size);
    refgemma_write(trace, file, "}", 1);
    refgemma_write(trace, file, spaces, padding);
    refgemma_write(trace, file, trace->data.bytes, trace->data.size);
    if (fclose(file) && !trace->error[0])
        snprintf(trace->error, sizeof trace->error, "%.150s: cannot be written", path);
    return trace->error[0] != 0;
}

static inline void refgemma_trace_free(refgemma_trace *trace) {
    free(trace->metadata.bytes);
    free(trace->tensors.bytes);
    free(trace->data.bytes);
    memset(trace, 0, sizeof *trace);
}

#endif
