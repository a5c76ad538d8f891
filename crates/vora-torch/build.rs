//! Compiles the C++ layer in `csrc/` against the headers of the libtorch that torch-sys links.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else {
        return; // torch-sys was built with `doc-only`: nothing is linked, so there is nothing to compile
    };
    let include = lib.parent().expect("the folder that holds lib/").join("include");
    check_version(&include);
    let target = std::env::var("TARGET").expect("cargo sets TARGET");
    let has_pairs = target.starts_with("x86_64") && attention_pairs();
    let mut layer = cc::Build::new();
    if has_pairs {
        layer.define("VORA_HAS_PAIRS", None);
    }
    for define in decode_kernels(&target) {
        layer.define(define, None);
    }
    layer
        .cpp(true)
        .std("c++17")
        .flag_if_supported("-Wno-unused-parameter")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // The loops in fused.cpp and loss.cpp are worth nothing unless vectorised, whatever the profile; libgomp is the one that
        // torch-sys links.
        .opt_level(3)
        .flag_if_supported("-fopenmp")
        .flag_if_supported("-fno-math-errno")
        .flag_if_supported("-fno-trapping-math")
        .flag_if_supported("-ffp-contract=fast")
        .files(["csrc/vora_torch.cpp", "csrc/fused.cpp", "csrc/loss.cpp", "csrc/attention.cpp", "csrc/profile.cpp"])
        .file("csrc/quantized.cpp")
        .files(["csrc/decode/step.cpp", "csrc/decode/linear.cpp"])
        .compile("vora_torch");
    dist(&include);
    attention_kernel("plain", "4", &[]);
    if target.starts_with("x86_64") {
        attention_kernel("avx2", "8", &["-mavx2", "-mfma"]);
        attention_kernel("avx512", "16", &["-mavx512f"]);
    }
    // Cargo puts a search path that lies in its target folder on LD_LIBRARY_PATH of what it runs, doctests included:
    // so libtorch is reached through a link there.
    let link = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("libtorch");
    let _ = std::fs::remove_file(&link);
    #[cfg(unix)]
    std::os::unix::fs::symlink(&lib, &link).expect("a link in OUT_DIR");
    println!("cargo:rustc-link-search=native={}", link.display());
    // The static library above refers to these two; named here, they follow it on the link line.
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
}

/// The libtorch that the bindings pair with, and their own way round the check.
const LIBTORCH: [&str; 2] = ["2", "11"];
const BYPASS: &str = "LIBTORCH_BYPASS_VERSION_CHECK";

/// Ends the build with one line where the headers are those of another libtorch. The bindings look for a file
/// `build-version`, which PyTorch's folder in a Python environment has not.
fn check_version(include: &Path) {
    println!("cargo:rerun-if-env-changed={BYPASS}");
    let headers = ["torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"];
    let headers = headers.map(|header| std::fs::read_to_string(include.join(header)).unwrap_or_default());
    let of = |part: &str| {
        let mut words = headers.iter().flat_map(|header| header.split_whitespace());
        words.find(|word| *word == format!("TORCH_VERSION_{part}")).and_then(|_| words.next().map(str::to_owned))
    };
    let (Some(major), Some(minor)) = (of("MAJOR"), of("MINOR")) else { return };
    let (wanted, folder) = (LIBTORCH.join("."), include.parent().unwrap_or(include).display());
    if [major.as_str(), minor.as_str()] != LIBTORCH && std::env::var_os(BYPASS).is_none() {
        println!(
            "cargo::error=libtorch in {folder} is {major}.{minor}, {wanted} is needed: point LIBTORCH at a folder of it, as \
             `pip install torch=={wanted}.0` makes one"
        );
        std::process::exit(1);
    }
}

/// Compiles the attention kernels for processors that multiply bf16, where the compiler knows them.
fn attention_pairs() -> bool {
    const FLAGS: [&str; 4] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"];
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).define("VORA_ISA", "avx512_bf16").define("VORA_VECTOR", "16");
    if !FLAGS.iter().all(|flag| build.is_flag_supported(flag).unwrap_or(false)) {
        return false;
    }
    for flag in FLAGS.iter().chain(&ATTENTION_FLAGS) {
        build.flag_if_supported(flag);
    }
    build.file("csrc/attention_pairs.cpp").compile("vora_attention_pairs");
    true
}

/// Flags of the attention kernels in every instruction set.
const ATTENTION_FLAGS: [&str; 5] =
    ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-maybe-uninitialized"];

/// Compiles the attention kernels for one instruction set, whose vectors hold that many floats.
fn attention_kernel(isa: &str, floats: &str, flags: &[&str]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).define("VORA_ISA", isa).define("VORA_VECTOR", floats);
    for flag in flags.iter().chain(&ATTENTION_FLAGS) {
        build.flag_if_supported(flag);
    }
    build.file("csrc/attention_kernel.cpp").compile(&format!("vora_attention_{isa}"));
}

/// What compilers may lack of the instruction sets of decoding: the define that tells the rest of the layer of it, the
/// namespace, the floats of a vector, and the flags.
type DecodeIsa = (&'static str, &'static str, &'static str, &'static [&'static str]);
const DECODE_ISAS: [DecodeIsa; 5] = [
    ("VORA_HAS_AVX2", "avx2", "8", &["-mavx2", "-mfma", "-mf16c"]),
    ("VORA_HAS_AVX_VNNI", "avx_vnni", "8", &["-mavx2", "-mfma", "-mf16c", "-mavxvnni"]),
    ("VORA_HAS_AVX512", "avx512", "16", &AVX512),
    ("VORA_HAS_VNNI", "avx512_vnni", "16", &["-mavx512vnni"]),
    ("VORA_HAS_BF16", "avx512_bf16", "16", &["-mavx512vnni", "-mavx512bf16"]),
];
const AVX512: [&str; 7] = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"];

/// Compiles the kernels of decoding, and says which instruction sets they are compiled for.
fn decode_kernels(target: &str) -> Vec<&'static str> {
    let compile = |isa: &str, floats: &str, flags: &[&str]| {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3).define("VORA_ISA", isa).define("VORA_VECTOR", floats);
        if !flags.iter().all(|flag| build.is_flag_supported(flag).unwrap_or(false)) {
            return false;
        }
        for flag in flags.iter().chain(&ATTENTION_FLAGS).chain(&["-Wno-uninitialized"]) {
            build.flag_if_supported(flag);
        }
        build.file("csrc/decode/kernel.cpp").compile(&format!("vora_decode_{isa}"));
        true
    };
    compile("plain", "4", &[]);
    let isas = DECODE_ISAS.iter().filter(|_| target.starts_with("x86_64"));
    let compiled = isas.filter(|(_, isa, floats, flags)| {
        let base: &[&str] = if *floats == "16" { &AVX512 } else { &[] };
        compile(isa, floats, &[base, flags].concat())
    });
    compiled.map(|(define, ..)| *define).collect()
}

/// Compiles what processes do together; Gloo's headers, which the wheel lacks, are declared in `csrc/dist/gloo`.
fn dist(include: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flag_if_supported("-Wno-unused-parameter")
        .include("csrc/dist")
        .include(include)
        .include(include.join("torch/csrc/api/include"))
        .files(["csrc/dist/group.cpp", "csrc/dist/reducer.cpp"])
        .compile("vora_dist");
}
