// CUDA's header of asynchronous copies: all of it that is here is in cuda_runtime.h.
#pragma once
#include "cuda_runtime.h"
