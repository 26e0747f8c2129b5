// A call file: an image of memory, with calls of ops on it. tests/_support/kernel_drivers.py writes it, and reads the
// blobs that the program writes back.
//
//     int64 blobs, relocations, calls
//     int64 size of each blob
//     int64 (blob, offset, target blob, target offset) of each relocation: an address to be written into a blob
//     int64 (op, blob) of each call: the blob is the struct of the op
//     the blobs
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "frozen_layers.h"
#include "packed_attention.h"
#include "precondition_accumulate.h"
#include "softmax_block.h"
#include "token_logprobs.h"
#include "unit_products.h"

class CallFile {
  public:
    explicit CallFile(const char* path) : file_(std::fopen(path, "rb")) {
        if (file_ == nullptr) std::abort();
        const int64_t blobs = number(), relocations = number(), calls = number();
        for (int64_t i = 0; i < blobs; ++i) blobs_.push_back({number(), nullptr});
        std::vector<int64_t> moves(4 * relocations);
        for (int64_t& part : moves) part = number();
        for (int64_t i = 0; i < calls; ++i) {
            const int64_t op = number();
            calls_.push_back({op, number()});
        }
        for (Blob& blob : blobs_) {
            // To the byte where it ends, so that a sanitizer sees what is read or written beyond.
            void* bytes = nullptr;
            if (posix_memalign(&bytes, kAlignment, static_cast<size_t>(blob.size)) != 0) std::abort();
            blob.bytes.reset(static_cast<char*>(bytes));
            read(blob.bytes.get(), blob.size);
        }
        for (size_t i = 0; i < moves.size(); i += 4) {
            const char* address = blobs_[moves[i + 2]].bytes.get() + moves[i + 3];
            std::memcpy(blobs_[moves[i]].bytes.get() + moves[i + 1], &address, sizeof(address));
        }
        std::fclose(file_);
    }

    // Calls run(op's struct) for each call, in order.
    template <typename Run>
    void run(const Run& run) {
        using namespace entropy_fast;
        for (const Call& call : calls_) {
            switch (call.op) {
                case 0:
                    run(*struct_of<TokenLogprobsForward>(call));
                    break;
                case 1:
                    run(*struct_of<TokenLogprobsBackward>(call));
                    break;
                case 2:
                    run(*struct_of<SoftmaxBlock>(call));
                    break;
                case 3:
                    run(*struct_of<PreconditionAccumulate>(call));
                    break;
                case 4:
                    run(*struct_of<SumsOfBlocks>(call));
                    break;
                case 5:
                    run(*struct_of<UnitProducts>(call));
                    break;
                case 6:
                    run(*struct_of<RmsNormForward>(call));
                    break;
                case 7:
                    run(*struct_of<RmsNormBackward>(call));
                    break;
                case 8:
                    run(*struct_of<GatedSiluForward>(call));
                    break;
                case 9:
                    run(*struct_of<GatedSiluBackward>(call));
                    break;
                case 10:
                    run(*struct_of<PackedAttentionForward>(call));
                    break;
                case 11:
                    run(*struct_of<PackedAttentionBackward>(call));
                    break;
                default:
                    std::abort();
            }
        }
    }

    void write(const char* path) const {
        std::FILE* file = std::fopen(path, "wb");
        if (file == nullptr) std::abort();
        for (const Blob& blob : blobs_) {
            const auto size = static_cast<size_t>(blob.size);
            if (std::fwrite(blob.bytes.get(), 1, size, file) != size) std::abort();
        }
        if (std::fclose(file) != 0) std::abort();
    }

  private:
    static constexpr size_t kAlignment = 64;
    struct Free {
        void operator()(char* bytes) const { std::free(bytes); }
    };
    struct Blob {
        int64_t size;
        std::unique_ptr<char, Free> bytes;
    };
    struct Call {
        int64_t op;
        int64_t blob;
    };

    void read(void* to, int64_t size) {
        if (std::fread(to, 1, static_cast<size_t>(size), file_) != static_cast<size_t>(size)) std::abort();
    }
    int64_t number() {
        int64_t value = 0;
        read(&value, sizeof(value));
        return value;
    }
    template <typename Struct>
    const Struct* struct_of(const Call& call) const {
        const Blob& blob = blobs_[call.blob];
        if (blob.size != sizeof(Struct)) std::abort();
        return reinterpret_cast<const Struct*>(blob.bytes.get());
    }

    std::FILE* file_;
    std::vector<Blob> blobs_;
    std::vector<Call> calls_;
};
