# Attention by cuDNN is in the build where its headers and cudnn-frontend's are (the library itself is
# loaded when the program runs); elsewhere, and with CAMBIUM_CUDNN=OFF, our own kernels serve alone.
if(NOT CAMBIUM_CUDA OR NOT CAMBIUM_CUDNN)
  return()
endif()
find_path(CUDNN_INCLUDE cudnn.h PATHS ${cuda_bin}/../include)
find_path(NVRTC_INCLUDE nvrtc.h PATHS ${cuda_bin}/../include)
find_path(CUDNN_FRONTEND_INCLUDE cudnn_frontend.h
          PATHS ${PROJECT_SOURCE_DIR}/third_party/cudnn-frontend/include)
if(NOT CUDNN_INCLUDE OR NOT NVRTC_INCLUDE OR NOT CUDNN_FRONTEND_INCLUDE)
  message(STATUS "Attention goes without cuDNN: cudnn.h: ${CUDNN_INCLUDE}, nvrtc.h: ${NVRTC_INCLUDE}, "
                 "cudnn-frontend (scripts/setup.sh build fetches it): ${CUDNN_FRONTEND_INCLUDE}")
  return()
endif()
# The headers are large and what the file does is not hot: optimised little, no debug information.
set(options -O1 -g0)
foreach(folder ${CUDNN_FRONTEND_INCLUDE} ${CUDNN_INCLUDE})
  if(NOT folder IN_LIST CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES)
    list(APPEND options -isystem${folder})
  endif()
endforeach()
set_source_files_properties(src/ops/attention/attention_cudnn_plan_cuda.cc PROPERTIES
                            COMPILE_DEFINITIONS CAMBIUM_CUDNN=1 COMPILE_OPTIONS "${options}")
