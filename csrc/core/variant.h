// The name of the instruction set that a file is compiled for (CMakeLists.txt), as text.
#pragma once

#define PAIRCLIP_TEXT_OF(name) #name
#define PAIRCLIP_TEXT(name) PAIRCLIP_TEXT_OF(name)
#define PAIRCLIP_VARIANT_NAME PAIRCLIP_TEXT(PAIRCLIP_VARIANT)
