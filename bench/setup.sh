# Begins a shell on a GPU machine that what `make gpu-carry` makes was copied to: unpacks it, unless the very same is unpacked, and says where things are. To be sourced, from
# the root of the tree.
cmp -s build/carry/of bin/carried ||
  { rm -rf dist build/gpu-site bin/carried && mkdir -p bin dist && tar -C bin -xJf build/carry/programs.tar.xz && cp build/carry/dmi-*.whl dist/ &&
    make --no-print-directory gpu-site && cp build/carry/of bin/carried; } ||
  { echo "setup.sh: build/carry could not be unpacked: is this the root of the tree, and was all of it carried?" >&2; return 1; }
. build/carry/of
export PYTHONPATH=$PWD/build/gpu-site DMI_BIN=$PWD/build/gpu-site/dmi/bin/dmi DMI_GPU_TESTS=$PWD/bin HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
