// JPEG through libjpeg's (libjpeg-turbo's) own interface. A warning counts as damage: the library goes on with grey blocks.
#include "loader/decode.h"

#if defined(PAIRCLIP_LIBJPEG)
#include <jpeglib.h>

#include <csetjmp>
#include <cstdio>
#endif

namespace pairclip::loader {

#if defined(PAIRCLIP_LIBJPEG)
namespace {

struct Failure {
  jpeg_error_mgr manager;  // first, so that libjpeg's pointer to it is one to us
  std::jmp_buf leave;
};

[[noreturn]] void fail(j_common_ptr info) { std::longjmp(reinterpret_cast<Failure*>(info->err)->leave, 1); }

void fail_on_warnings(j_common_ptr info, int level) {
  if (level < 0) fail(info);
}

class JpegCodec : public Decoder::Codec {
 public:
  JpegCodec(int width, int height) : width_(width), height_(height) {
    info_.err = jpeg_std_error(&failure_.manager);
    failure_.manager.error_exit = fail;
    failure_.manager.emit_message = fail_on_warnings;
    if (setjmp(failure_.leave) == 0) {
      jpeg_create_decompress(&info_);
      created_ = true;
    }
  }

  ~JpegCodec() override {
    if (created_) jpeg_destroy_decompress(&info_);
  }

  // Nothing with a destructor may live between setjmp and longjmp: only the library's own memory, which abort frees.
  bool decode(std::span<const std::uint8_t> record, std::uint8_t* picture) override {
    if (!created_ || record.empty()) return false;
    if (setjmp(failure_.leave) != 0) {
      jpeg_abort_decompress(&info_);
      return false;
    }
    jpeg_mem_src(&info_, const_cast<std::uint8_t*>(record.data()), static_cast<unsigned long>(record.size()));
    jpeg_read_header(&info_, TRUE);
    const bool ours = info_.image_width == static_cast<unsigned>(width_) &&
                      info_.image_height == static_cast<unsigned>(height_) && info_.num_components == 3 &&
                      (info_.jpeg_color_space == JCS_YCbCr || info_.jpeg_color_space == JCS_RGB);
    if (!ours) {
      jpeg_abort_decompress(&info_);
      return false;
    }
    info_.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info_);
    while (info_.output_scanline < info_.output_height) {
      JSAMPROW row = picture + static_cast<std::size_t>(info_.output_scanline) * 3 * static_cast<std::size_t>(width_);
      jpeg_read_scanlines(&info_, &row, 1);
    }
    jpeg_finish_decompress(&info_);
    return true;
  }

 private:
  int width_, height_;
  jpeg_decompress_struct info_{};
  Failure failure_{};
  bool created_ = false;
};

}  // namespace

std::unique_ptr<Decoder::Codec> make_jpeg_codec(int width, int height) { return std::make_unique<JpegCodec>(width, height); }
#else
std::unique_ptr<Decoder::Codec> make_jpeg_codec(int, int) { return nullptr; }
#endif

}  // namespace pairclip::loader
