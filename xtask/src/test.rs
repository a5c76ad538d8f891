//! `cargo xtask test`: sets up, then runs every test of the workspace, doctests included.

use std::env;
use std::process::Command;

use anyhow::Result;

use crate::{cmd, setup};

const EXAMPLES: &str = "\
Examples:
  cargo xtask test
  cargo xtask test -- --package vora-llm
  cargo xtask test -- --package vora-llm rotary -- --nocapture";

/// Arguments of `test`.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Handed to `cargo test`
    #[arg(last = true, value_name = "ARGS")]
    pub args: Vec<String>,
}

/// Runs the tests.
pub fn run(args: &Args) -> Result<()> {
    cmd::run(&mut command(args)?)
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
