# cambium_kernels(TARGET FILES...): compiles the files once per instruction set into the target.
function(cambium_kernels target)
  if(NOT ARGN)
    return()
  endif()
  set(isas generic)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND isas avx2 avx512)
  endif()
  set(flags_generic -O3 -ffp-contract=fast -Wno-psabi)
  if(CAMBIUM_SANITIZE MATCHES "^address")
    set(flags_generic -O1 -ffp-contract=fast -Wno-psabi)
  endif()
  set(flags_avx2 ${flags_generic} -mavx2 -mfma -mf16c)
  set(flags_avx512 ${flags_generic} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
      -mprefer-vector-width=512)
  foreach(isa ${isas})
    add_library(${target}_${isa} OBJECT ${ARGN})
    target_link_libraries(${target}_${isa} PRIVATE cambium_flags)
    target_compile_definitions(${target}_${isa} PRIVATE CAMBIUM_ISA=isa_${isa})
    target_compile_options(${target}_${isa} PRIVATE ${flags_${isa}})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
  endforeach()
endfunction()

# cambium_text(TARGET FILE): the file's text as the constant cambium::NAME_EXTENSION of the target, for
# a header to declare: extern const char NAME_EXTENSION[].
function(cambium_text target file)
  get_filename_component(name ${file} NAME)
  string(MAKE_C_IDENTIFIER ${name} name)
  file(READ ${file} text)
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/texts/${name}.cc @ONLY CONTENT
    "// Made of ${file}.\nnamespace cambium {\nextern const char @name@[];\nconst char @name@[] = R\"text(@text@)text\";\n}  // namespace cambium\n")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  target_sources(${target} PRIVATE ${CMAKE_BINARY_DIR}/texts/${name}.cc)
endfunction()

# cambium_units(OUT NAME SOURCES...): sets OUT to what is to be compiled for the sources: themselves or,
# under CAMBIUM_UNITS, files that include several at a time, as scripts/units.py says which, for what
# their headers instantiate. Sources with options of their own stay alone.
function(cambium_units out name)
  set(alone)
  set(joined)
  foreach(source ${ARGN})
    get_source_file_property(options ${source} COMPILE_OPTIONS)
    if(CAMBIUM_UNITS AND NOT options)
      list(APPEND joined ${source})
    else()
      list(APPEND alone ${source})
    endif()
  endforeach()
  if(joined)
    execute_process(COMMAND python3 ${PROJECT_SOURCE_DIR}/scripts/units.py
                            ${CMAKE_BINARY_DIR}/units/${name} ${joined}
                    OUTPUT_VARIABLE units COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]+" joined "${units}")
  endif()
  set(${out} ${alone} ${joined} PARENT_SCOPE)
endfunction()

# cambium_optimised(TARGET): tests take longer to optimise than to run, but for the definitions of
# operations; so does all instrumented code, but for the loops over data and, under AddressSanitizer,
# readers of text.
function(cambium_optimised target)
  set(slightly "^test_ops$")
  if(CAMBIUM_SANITIZE MATCHES "^address")
    set(slightly "^(cambium_(base|tensor|text|files|ops)|test_ops)$")
  elseif(CAMBIUM_SANITIZE)
    set(slightly "^(cambium|test)_(tensor|ops)$")
  endif()
  if(target MATCHES "${slightly}")
    target_compile_options(${target} PRIVATE $<$<NOT:$<CONFIG:Debug>>:-O1>)
  elseif(target MATCHES "^test_" AND NOT CAMBIUM_SANITIZE)  # -O0 there already
    target_compile_options(${target} PRIVATE -O0)
  endif()
endfunction()

# cambium_room(NAME DEPS...): a static library cambium_NAME of every source under src/NAME, by rules
# that file names carry, so that a new file never needs a line here:
#   *_test.cc   unit tests, gathered in the executable test_NAME
#   *_cpu.cc    CPU kernels, compiled once per instruction set (base/simd.h says how they are chosen)
#   *_cuda.cu   CUDA kernels, when CAMBIUM_CUDA is on
#   *_cuda.cc   host code that calls CUDA's libraries, likewise
#   *.py        what checkpoints carry for other programs, as texts: NAME.py is cambium::NAME_py
#   main.cc     the program's entry, not part of the library
function(cambium_room name)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*.cc)
  set(kernels ${sources})
  list(FILTER sources EXCLUDE REGEX "(_test|_cpu|_cuda|/main)\\.cc$")
  list(FILTER kernels INCLUDE REGEX "_cpu\\.cc$")
  if(NOT sources)
    set(sources ${PROJECT_SOURCE_DIR}/cmake/empty.cc)
  endif()
  cambium_units(sources ${name} ${sources})
  add_library(cambium_${name} STATIC ${sources})
  target_link_libraries(cambium_${name} PUBLIC cambium_flags)
  cambium_optimised(cambium_${name})
  foreach(dep ${ARGN})
    target_link_libraries(cambium_${name} PUBLIC cambium_${dep})
  endforeach()
  cambium_kernels(cambium_${name} ${kernels})
  file(GLOB_RECURSE texts CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*.py)
  foreach(text ${texts})
    cambium_text(cambium_${name} ${text})
  endforeach()
  if(CAMBIUM_CUDA)
    file(GLOB_RECURSE cuda CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*_cuda.cu
         ${PROJECT_SOURCE_DIR}/src/${name}/*_cuda.cc)
    if(cuda)
      target_sources(cambium_${name} PRIVATE ${cuda})
      target_link_libraries(cambium_${name} PUBLIC CUDA::cudart_static)
    endif()
  endif()
endfunction()

# cambium_room_tests(NAMES...): the executable test_NAME for each room that has *_test.cc files. Tests
# under tests/NAME (end-to-end and parity) join the room's own; *_cpu.cc files there are kernels that
# only tests need.
function(cambium_room_tests)
  file(STRINGS cmake/repeating_tests.txt repeating REGEX "^[^#]")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS cmake/repeating_tests.txt)
  string(JOIN ":" repeating ${repeating})
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/texts/test_paths.cc @ONLY CONTENT
"// Made by cmake/rooms.cmake for base/test_paths.h.
#include \"base/test_paths.h\"

namespace cambium {
const char kSourceDir[] = \"${PROJECT_SOURCE_DIR}\";
const char kProgram[] = \"${CMAKE_BINARY_DIR}/cambium\";
}  // namespace cambium
")
  foreach(name ${ARGN})
    file(GLOB_RECURSE tests CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*_test.cc
         ${PROJECT_SOURCE_DIR}/tests/${name}/*_test.cc)
    if(tests)
      cambium_units(tests test_${name} ${tests})
      add_executable(test_${name} ${tests} ${CMAKE_BINARY_DIR}/texts/test_paths.cc)
      file(GLOB kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/${name}/*_cpu.cc)
      cambium_kernels(test_${name} ${kernels})
      cambium_optimised(test_${name})
      target_link_libraries(test_${name} PRIVATE cambium_${name} GTest::gmock GTest::gtest_main)
      if(CAMBIUM_SANITIZE)  # starting an instrumented process takes longer than most tests do
        foreach(shard RANGE 3)
          add_test(NAME ${name}:${shard} COMMAND test_${name})
          set(environment GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=${shard} GTEST_FILTER=-${repeating})
          set_tests_properties(${name}:${shard} PROPERTIES TIMEOUT 1800
                               ENVIRONMENT "${environment}")
        endforeach()
      else()
        # Disabled tests are processes that other tests start (base/test_child.h).
        gtest_discover_tests(test_${name} TEST_PREFIX ${name}: NO_PRETTY_VALUES
                             TEST_FILTER -*.DISABLED_*
                             DISCOVERY_TIMEOUT 120
                             PROPERTIES TIMEOUT 900)
      endif()
    endif()
  endforeach()
endfunction()
