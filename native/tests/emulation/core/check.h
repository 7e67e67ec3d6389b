#pragma once
#define OCTOLORA_CUDA(call, ...) ((void)(call))
