//! `cargo xtask test`: sets up, then runs every test of the workspace, doctests included.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use clap::ValueEnum;

use crate::{cmd, setup};

const EXAMPLES: &str = "\
Examples:
  cargo xtask test
  cargo xtask test -- --package vora-llm
  cargo xtask test -- --package vora-llm rotary -- --nocapture
  cargo xtask test --dtype f32 --dtype bf16 -- --package vora-train
  cargo xtask test --all-isas          once in every instruction set that this processor has";

/// Arguments of `test`.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Dtype that runs compute in where they name none; given more than once, the tests run once in each
    #[arg(long = "dtype", value_name = "DTYPE")]
    pub dtypes: Vec<Dtype>,
    /// Instruction set that libtorch, oneDNN, MKL and our own kernels are held to; once in each
    #[arg(long = "isa", value_name = "ISA")]
    pub isas: Vec<Isa>,
    /// Once in each instruction set; says which ones this processor lacks
    #[arg(long, conflicts_with = "isas")]
    pub all_isas: bool,
    /// Handed to `cargo test`
    #[arg(last = true, value_name = "ARGS")]
    pub args: Vec<String>,
}

/// A dtype as `VORA_DTYPE` names it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
}

/// An instruction set of x86-64 processors, oldest first.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Isa {
    /// What every x86-64 processor has
    Default,
    Avx2,
    Avx512,
    Avx512Bf16,
    Amx,
}

impl Isa {
    /// Its flag in /proc/cpuinfo.
    fn flag(self) -> &'static str {
        match self {
            Isa::Default => "sse2",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512dq",
            Isa::Avx512Bf16 => "avx512_bf16",
            Isa::Amx => "amx_bf16",
        }
    }

    /// What holds each library to it. Our own kernels follow libtorch's choice.
    fn environment(self) -> [(&'static str, &'static str); 3] {
        let (libtorch, onednn, mkl) = match self {
            Isa::Default => ("default", "SSE41", "SSE4_2"),
            Isa::Avx2 => ("avx2", "AVX2", "AVX2"),
            Isa::Avx512 => ("avx512", "AVX512_CORE", "AVX512"),
            Isa::Avx512Bf16 => ("avx512", "AVX512_CORE_BF16", "AVX512"),
            Isa::Amx => ("avx512", "AVX512_CORE_AMX", "AVX512"),
        };
        [("ATEN_CPU_CAPABILITY", libtorch), ("ONEDNN_MAX_CPU_ISA", onednn), ("MKL_ENABLE_INSTRUCTIONS", mkl)]
    }

    fn name(self) -> String {
        self.to_possible_value().expect("no variant is skipped").get_name().to_owned()
    }
}

/// Runs the tests, once for each dtype and instruction set asked for.
pub fn run(args: &Args) -> Result<()> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let isas = instruction_sets(args, &cpuinfo)?;
    let dtypes = args.dtypes.iter().copied().map(Some).collect::<Vec<_>>();
    for isa in &isas {
        for dtype in if dtypes.is_empty() { &[None][..] } else { &dtypes } {
            let mut test = command(args)?;
            if let Some(isa) = isa {
                test.envs(isa.environment());
            }
            if let Some(dtype) = dtype {
                test.env("VORA_DTYPE", dtype.to_possible_value().expect("no variant is skipped").get_name());
            }
            if isa.is_some() || dtype.is_some() {
                let isa = isa.map_or_else(|| "the processor's".to_owned(), Isa::name);
                let dtype =
                    dtype.map_or_else(|| "the tests' own".to_owned(), |dtype| format!("{dtype:?}").to_lowercase());
                eprintln!("instruction set: {isa}; dtype: {dtype}");
            }
            cmd::run(&mut test)?;
        }
    }
    Ok(())
}

/// Those asked for; what the processor lacks is refused where it was named, and told of where all were asked for.
fn instruction_sets(args: &Args, cpuinfo: &str) -> Result<Vec<Option<Isa>>> {
    let has = |isa: &Isa| cpuinfo.split_whitespace().any(|word| word == isa.flag());
    if args.all_isas {
        let (there, lacking): (Vec<Isa>, Vec<Isa>) = Isa::value_variants().iter().partition(|isa| has(isa));
        for isa in lacking {
            eprintln!("NOT RUN: {}, this processor has no {}", isa.name(), isa.flag());
        }
        ensure!(!there.is_empty(), "--all-isas: /proc/cpuinfo tells of no instruction set of x86-64");
        return Ok(there.into_iter().map(Some).collect());
    }
    for isa in &args.isas {
        ensure!(has(isa), "--isa {}: this processor has no {}", isa.name(), isa.flag());
    }
    Ok(if args.isas.is_empty() { vec![None] } else { args.isas.iter().copied().map(Some).collect() })
}

/// What runs the tests, with all that it needs set up.
pub fn command(args: &Args) -> Result<Command> {
    setup::ensure()?;
    let mut test = cmd::cargo();
    test.args(["test", "--locked"]);
    if !args.args.iter().any(|arg| arg == "-p" || arg.starts_with("--package")) {
        test.arg("--workspace");
    }
    // Tests run beside each other already; teams of threads inside each would only wait for one another.
    if env::var_os("OMP_NUM_THREADS").is_none() {
        test.env("OMP_NUM_THREADS", "1");
    }
    test.args(&args.args);
    Ok(test)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_sets_are_those_of_the_processor() {
        let avx2 = "flags\t\t: sse2 avx avx2 fma\n";
        let names = |args: &Args, cpuinfo: &str| {
            instruction_sets(args, cpuinfo)
                .map(|isas| isas.into_iter().map(|isa| isa.map(Isa::name)).collect::<Vec<_>>())
        };
        assert_eq!(names(&Args::default(), avx2).unwrap(), [None]);
        let all = Args { all_isas: true, ..Args::default() };
        assert_eq!(names(&all, avx2).unwrap(), [Some("default".to_owned()), Some("avx2".to_owned())]);
        assert!(names(&all, "").is_err());
        let args = Args { isas: vec![Isa::Avx2, Isa::Avx512Bf16], ..Args::default() };
        let error = names(&args, avx2).unwrap_err().to_string();
        assert_eq!(error, "--isa avx512-bf16: this processor has no avx512_bf16");
    }
}
