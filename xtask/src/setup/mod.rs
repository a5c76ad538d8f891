//! `cargo xtask setup`: finds or fetches libtorch and links it at `.libtorch`, where `.cargo/config.toml` looks.

mod home;
mod nccl;
mod wheels;

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::cmd;
use wheels::Pip;

/// The libtorch that tch 0.24 pairs with.
const VERSION: &str = "2.11.0";

const EXAMPLES: &str = "\
Examples:
  cargo xtask setup                   fetch libtorch with pip, or link what the cache has
  cargo xtask setup --cuda            with the CUDA libraries and NCCL, for a machine with NVIDIA GPUs
  cargo xtask setup --wheel torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl
                                      without a network; the nvidia-* wheels are looked for beside it
  LIBTORCH=/opt/libtorch cargo xtask setup
                                      a libtorch 2.11.0 of your own; a Python's site-packages/torch is one too";

/// Arguments of `setup`.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Take torch from this file instead of the package index
    #[arg(long, value_name = "FILE")]
    wheel: Option<PathBuf>,
    /// Fetch the CUDA libraries too (2 GB more, 3.7 GB unpacked), and build what opens NCCL, in .libtorch/lib; the default where
    /// an NVIDIA driver is found
    #[arg(long)]
    cuda: bool,
    /// No CUDA libraries, whatever the machine has
    #[arg(long, conflicts_with = "cuda")]
    cpu: bool,
}

/// Why a system is not served; none where nothing is known against it.
fn unserved(os: &str) -> Option<String> {
    let (name, instead) = match os {
        "linux" => return None,
        "macos" => ("macOS", "a Linux container on this machine"),
        "windows" => ("Windows", "WSL 2 on this machine"),
        other => (other, "a Linux machine"),
    };
    Some(format!(
        "{name} is not served: no libtorch {VERSION} is pinned for it, and the C++ of vora-torch has been built by GCC and linked to \
         libgomp on Linux alone; {instead} serves"
    ))
}

/// Links the libtorch that was asked for, fetching it if the cache lacks it.
pub fn run(args: &Args) -> Result<()> {
    if let Some(reason) = unserved(env::consts::OS) {
        bail!(reason);
    }
    let link = cmd::root().join(".libtorch");
    let cuda = args.cuda || (!args.cpu && nvidia_driver(Path::new("/")));
    let home = match users_libtorch(&cmd::root(), env::var_os("LIBTORCH").map(PathBuf::from)) {
        Some(libtorch) => home::of_user(&cmd::cache()?, &libtorch)?,
        None if args.wheel.is_none() && !args.cpu && home::is_linked(&link, cuda) => home::of_link(&link)?,
        None => cached(&cmd::cache()?, cuda, args.wheel.as_deref(), &Pip::default())?,
    };
    home::link(&link, &home)?;
    eprintln!("libtorch {VERSION}: {} -> {}", link.display(), home.display());
    compiler()?;
    if !cuda {
        return Ok(());
    }
    match nccl::build(&home, args.wheel.as_deref(), &Pip::default()).context("NCCL, for several GPUs, is not there") {
        Err(error) if !args.cuda => {
            eprintln!("{error:#}");
            Ok(())
        }
        built => built,
    }
}

/// Before the other tasks: sets up unless some good libtorch is linked.
pub fn ensure() -> Result<()> {
    if home::is_linked(&cmd::root().join(".libtorch"), false) { compiler() } else { run(&Args::default()) }
}

/// LIBTORCH as a user set it. cargo sets it as well, to the clone's own `.libtorch`, for what it runs.
fn users_libtorch(root: &Path, libtorch: Option<PathBuf>) -> Option<PathBuf> {
    libtorch.filter(|path| {
        let in_root = path.parent().and_then(|parent| parent.canonicalize().ok()) == root.canonicalize().ok();
        let own = path.ends_with(".libtorch") && in_root;
        !own && !path.as_os_str().is_empty()
    })
}

/// Whether the machine has an NVIDIA driver; `root` is `/`.
fn nvidia_driver(root: &Path) -> bool {
    [
        "proc/driver/nvidia/version",
        "usr/lib/x86_64-linux-gnu/libcuda.so.1",
        "usr/lib64/libcuda.so.1",
        "usr/lib/wsl/lib/libcuda.so.1",
    ]
    .iter()
    .any(|path| root.join(path).exists())
}

/// The folder of the pinned libtorch in the cache; made there first if it is missing.
fn cached(cache: &Path, cuda: bool, wheel: Option<&Path>, pip: &Pip) -> Result<PathBuf> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")),
        "torch {VERSION} is fetched for Linux x86_64 with glibc only; set LIBTORCH to a libtorch {VERSION} for this machine"
    );
    let home = cache.join(format!("libtorch-{VERSION}{}", if cuda { "-cuda" } else { "" }));
    fs::create_dir_all(cache).with_context(|| format!("cannot make the cache folder {}", cache.display()))?;
    let _lock = lock(&cache.join("setup.lock"))?;
    if home::is_complete(&home, cuda) {
        return Ok(home);
    }
    // All is made beside its place: what an interrupted setup leaves is here, and only whole, verified wheels are reused.
    let partial = home::beside(&home);
    let mut pins = wheels::pins(include_str!("pinned-cpu.txt"));
    if cuda {
        pins.extend(wheels::pins(include_str!("pinned-cuda.txt")));
    }
    let files = wheels::collect(&pins, wheel, &partial.join("wheels"), pip)?;
    home::make(&partial.join("home"), &files, cuda).context("unpacking libtorch")?;
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("removing the incomplete {}", home.display()))?;
    }
    fs::rename(partial.join("home"), &home).with_context(|| format!("cannot make {}", home.display()))?;
    fs::remove_dir_all(&partial).with_context(|| format!("removing {}", partial.display()))?;
    Ok(home)
}

/// Held until dropped; the kernel lets it go if this program dies.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        eprintln!("waiting for another `cargo xtask setup` to end");
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

/// torch-sys compiles C++: better one line now than a page from cargo.
fn compiler() -> Result<()> {
    if env::var_os("CXX").is_none() && !cmd::on_path("c++") {
        bail!(
            "no C++ compiler: `c++` is not on PATH; install g++ (`apt install g++`, `dnf install gcc-c++`) or set CXX"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn other_systems_are_refused_by_name() {
        assert_eq!(super::unserved("linux"), None);
        let macos = super::unserved("macos").unwrap();
        assert!(macos.starts_with("macOS is not served: no libtorch 2.11") && macos.contains("libgomp"), "{macos}");
        assert!(super::unserved("windows").unwrap().contains("WSL 2"));
    }

    use super::*;

    #[test]
    fn cargos_own_libtorch_is_not_the_users() {
        let root = tempfile::tempdir().unwrap();
        let users = |path: &str| users_libtorch(root.path(), Some(path.into()));
        assert_eq!(users_libtorch(root.path(), None), None);
        assert_eq!(users(""), None);
        assert_eq!(users(root.path().join(".libtorch").to_str().unwrap()), None);
        assert_eq!(users("/opt/libtorch"), Some("/opt/libtorch".into()));
        assert_eq!(users("/opt/.libtorch"), Some("/opt/.libtorch".into()));
    }

    #[test]
    fn driver_is_found_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        assert!(!nvidia_driver(root.path()));
        fs::create_dir_all(root.path().join("usr/lib64")).unwrap();
        fs::write(root.path().join("usr/lib64/libcuda.so.1"), "").unwrap();
        assert!(nvidia_driver(root.path()));
    }

    #[test]
    fn failed_fetch_leaves_no_home_and_says_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let pip =
            Pip::fake(cache.path(), "echo 'WARNING: Retrying (Retry(total=4)) after connection broken' >&2; exit 1");
        let err = format!("{:#}", cached(cache.path(), false, None, &pip).unwrap_err());
        assert!(err.contains("cannot be reached") && err.contains("--wheel") && err.contains("LIBTORCH"), "{err}");
        assert!(!err.contains('\n'), "{err}");
        assert!(!cache.path().join("libtorch-2.11.0").exists());
    }

    #[test]
    fn wheel_with_a_wrong_hash_is_refused() {
        let cache = tempfile::tempdir().unwrap();
        let wheel = cache.path().join("torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl");
        fs::write(&wheel, "not what was pinned").unwrap();
        let err = format!("{:#}", cached(cache.path(), false, Some(&wheel), &Pip::default()).unwrap_err());
        assert!(err.contains("sha256") && err.contains("torch 2.11.0"), "{err}");
        assert!(!cache.path().join("libtorch-2.11.0").exists());
    }

    #[test]
    fn complete_home_is_taken_as_it_is() {
        let cache = tempfile::tempdir().unwrap();
        let home = cache.path().join("libtorch-2.11.0");
        home::make(&home, &[home::tests::tiny_wheel(cache.path())], false).unwrap();
        let pip = Pip::fake(cache.path(), "exit 1"); // must not be asked
        assert_eq!(cached(cache.path(), false, None, &pip).unwrap(), home);
        assert!(cached(cache.path(), true, None, &pip).is_err(), "the CUDA libraries are not there");
    }
}
