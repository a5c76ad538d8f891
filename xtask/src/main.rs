//! The tasks of this workspace, as `cargo xtask <task>`: each drives cargo, pip or the program `vora`.
//!
//! It depends on crates of the workspace that link no libtorch, so that it builds on a machine that has none yet.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tasks talk to the person who started them")]
#![allow(unreachable_pub, reason = "a program has no outside: `pub` is what the other tasks may use")]

mod bench;
mod check;
mod clients;
mod cmd;
mod compare;
mod docs;
mod download;
mod examples;
mod fixtures;
mod setup;
mod test;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  cargo xtask train                  set up, download, train a small VoRA, evaluate, merge, ask it questions
  cargo xtask train --smoke          the same in seconds, with a tiny random model
  cargo xtask test                   set up, run every test
  cargo xtask check --cheap          format, tidy, dependency rules, lints, docs
  cargo xtask check --tidy           circles, arrows, public paths and sizes alone
  cargo xtask check --examples       build and run the programs of examples/
  cargo xtask check --clients        vora serve, asked by the clients that people use
  cargo xtask setup --wheel torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl";

/// Tasks of the vora workspace; every one sets up libtorch first when it needs it
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find or fetch libtorch and link it at .libtorch
    Setup(setup::Args),
    /// Fetch model weights into the hub's cache folder
    Download(download::Args),
    /// Train a VoRA, evaluate it, merge it, ask it questions
    Train(train::Args),
    /// Run every test, doctests included
    Test(test::Args),
    /// What must pass before a change goes in: format, tidy (the order of files and crates), dependency rules, lints, docs, tests
    Check(check::Args),
    /// Write docs/run-file.md from the types that read a run file
    Docs,
    /// Run benches; `bench attention --train` compares training with bidirectional and causal vision attention
    Bench(bench::Args),
    /// Rebuild the golden tensors in a Python environment of their own; `--table` says how close to them everything is
    Fixtures(fixtures::Args),
    /// Ask the reference libraries and `vora` the same seeded questions at every border, outside CI
    Compare(compare::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => setup::run(&args),
        Task::Download(args) => download::run(args),
        Task::Train(args) => train::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Check(args) => check::run(&args),
        Task::Docs => docs::run(),
        Task::Bench(args) => bench::run(&args),
        Task::Fixtures(args) => fixtures::run(&args),
        Task::Compare(args) => compare::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::from(err.downcast_ref::<cmd::ChildFailed>().map_or(1, cmd::ChildFailed::code))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_exit_with_2() {
        for wrong in [
            &["train", "--set", "lr"][..],
            &["bench", "--train"],
            &["setup", "--cuda", "--cpu"],
            &["tset"],
            &["compare", "--case", "1"],
        ] {
            let err = Cli::try_parse_from(["cargo xtask"].iter().chain(wrong)).expect_err("must be refused");
            assert_eq!(err.exit_code(), 2, "{wrong:?}");
        }
    }
}
