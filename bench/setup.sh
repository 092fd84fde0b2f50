# Begins a shell on a GPU machine that what `make gpu-carry` makes was copied to: unpacks what is not unpacked yet, and says where things are. To be sourced, from the root of
# the tree.
mkdir -p bin dist
[ -x bin/bench-sink ] || tar -C bin -xJf build/carry/programs.tar.xz
ls dist/dmi-*.whl >/dev/null 2>&1 || cp build/carry/dmi-*.whl dist/
[ -d build/gpu-site/dmi ] || make --no-print-directory gpu-site
. build/carry/of
export PYTHONPATH=$PWD/build/gpu-site DMI_BIN=$PWD/build/gpu-site/dmi/bin/dmi DMI_GPU_TESTS=$PWD/bin HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
