//! The tasks of this workspace.

mod download;

use clap::Parser;

/// Tasks of this workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Fetch model weights into the hub's cache folder
    Download(download::Args),
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Download(args) => download::run(args),
    }
}
