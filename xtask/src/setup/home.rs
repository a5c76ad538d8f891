//! The folder that holds one libtorch, and the view of it that programs are linked against:
//!
//! ```text
//! torch/{lib,include}  nvidia/      as the wheels have them: libtorch finds the NVIDIA libraries by `../../nvidia`
//! view/lib/                         links to the CPU half of torch/lib
//! view/lib/libvora_nccl.so          where CUDA is: what NCCL is reached by
//! view/{include,build-version}      for torch-sys; `.libtorch` in a clone is a link to view/
//! ```
//!
//! torch-sys links `torch_cuda` when it lies in the folder, and the program would then start on no other machine; so
//! the view leaves it out, and vora-torch opens it at run time where it is.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::VERSION;

/// Unpacks the wheels into the new folder `home` and adds the view; what lay there is removed first.
pub fn make(home: &Path, wheels: &[PathBuf], cuda: bool) -> Result<()> {
    if home.exists() {
        fs::remove_dir_all(home).with_context(|| format!("removing {}", home.display()))?;
    }
    fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    for wheel in wheels {
        unpack(wheel, home, if cuda { wanted_cuda } else { wanted_cpu })
            .with_context(|| format!("unpacking {}", wheel.display()))?;
    }
    check_version(&home.join("torch"))?;
    make_view(home)
}

fn wanted_cpu(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let in_torch = ["libc10.so", "libtorch.so", "libtorch_cpu.so", "libgomp.so.1"].contains(&file);
    (name.starts_with("torch/lib/") && in_torch)
        || name.starts_with("torch/include/")
        || (name.starts_with("nvidia/") && (file.starts_with("libcudart.so") || file.starts_with("libcupti.so")))
        || name.contains(".dist-info/licenses/")
}

fn wanted_cuda(name: &str) -> bool {
    wanted_cpu(name)
        || (name.starts_with("torch/lib/") && !name.contains("python"))
        || (name.starts_with("nvidia/") && !name.ends_with(".a"))
}

/// Unpacks into `home` what is wanted of a wheel.
pub fn unpack(wheel: &Path, home: &Path, wanted: fn(&str) -> bool) -> Result<()> {
    let mut archive = ZipArchive::new(File::open(wheel)?)?;
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i)?;
        let name = entry.name()?.into_owned();
        if entry.is_dir() || !wanted(&name) {
            continue;
        }
        let path = entry.enclosed_name().with_context(|| format!("`{name}` points outside the wheel"))?;
        let path = home.join(path);
        fs::create_dir_all(path.parent().expect("it lies in home"))?;
        let mut file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        io::copy(&mut entry, &mut file).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Adds `view/` beside `torch/`. `build-version` comes last: with it the view is complete.
fn make_view(home: &Path) -> Result<()> {
    let torch = home.join("torch");
    let lib = home.join("view/lib");
    fs::create_dir_all(&lib).with_context(|| format!("cannot make {}", lib.display()))?;
    symlink("../torch/include", home.join("view/include"))?;
    for entry in fs::read_dir(torch.join("lib"))? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        let gpu = ["libtorch_cuda", "libc10_cuda", "libtorch_hip", "libc10_hip"].iter().any(|p| text.starts_with(p));
        if text.contains(".so") && !text.contains("python") && !gpu {
            symlink(Path::new("../../torch/lib").join(&name), lib.join(&name))?;
        }
    }
    for name in ["libtorch_cpu.so", "libtorch.so", "libc10.so"] {
        ensure!(lib.join(name).exists(), "no {name} in {}", torch.join("lib").display());
    }
    fs::write(home.join("view/build-version"), format!("{VERSION}\n")).context("cannot write build-version")
}

/// Refuses a libtorch whose headers tell of another version.
fn check_version(torch: &Path) -> Result<()> {
    let header = torch.join("include/torch/headeronly/version.h");
    let text = fs::read_to_string(&header)
        .with_context(|| format!("no libtorch {VERSION}: cannot read {}", header.display()))?;
    let number = |part: &str| {
        let define = format!("#define TORCH_VERSION_{part} ");
        text.lines().find_map(|line| line.strip_prefix(&define)).map_or("?", str::trim).to_owned()
    };
    let version = [number("MAJOR"), number("MINOR"), number("PATCH")].join(".");
    ensure!(version == VERSION, "this is libtorch {version}, tch needs {VERSION}");
    Ok(())
}

/// A home around a libtorch that the user has: a zip from pytorch.org, or `torch/` of a Python's site-packages.
pub fn of_user(cache: &Path, libtorch: &Path) -> Result<PathBuf> {
    let context = || format!("LIBTORCH={} must be the folder with libtorch's lib/ and include/", libtorch.display());
    let torch = libtorch.canonicalize().with_context(context)?;
    check_version(&torch).with_context(context)?;
    let digest = Sha256::digest(torch.as_os_str().as_encoded_bytes());
    let home =
        cache.join(format!("libtorch-user-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3]));
    if is_complete(&home, false) {
        return Ok(home);
    }
    let partial = beside(&home);
    for old in [&partial, &home] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("removing {}", old.display()))?;
        }
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    symlink(&torch, partial.join("torch"))?;
    symlink(torch.with_file_name("nvidia"), partial.join("nvidia"))?; // dangles where there is none
    make_view(&partial).with_context(context)?;
    fs::rename(&partial, &home).with_context(|| format!("cannot make {}", home.display()))?;
    Ok(home)
}

/// Where a home is made before it is moved to its place in one step.
pub fn beside(home: &Path) -> PathBuf {
    let mut name = home.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Whether `home` holds a whole libtorch of this version, with the CUDA libraries if they are asked for.
pub fn is_complete(home: &Path, cuda: bool) -> bool {
    let version = fs::read_to_string(home.join("view/build-version")).unwrap_or_default();
    version.trim() == VERSION
        && home.join("view/lib/libtorch_cpu.so").exists()
        && home.join("view/include/torch").exists()
        && (!cuda || home.join("torch/lib/libtorch_cuda.so").exists())
}

/// Whether `link` leads to a complete libtorch.
pub fn is_linked(link: &Path, cuda: bool) -> bool {
    link.canonicalize().is_ok_and(|view| view.parent().is_some_and(|home| is_complete(home, cuda)))
}

/// The home that `link` leads to.
pub fn of_link(link: &Path) -> Result<PathBuf> {
    let view = link.canonicalize().with_context(|| format!("cannot follow {}", link.display()))?;
    Ok(view.parent().context("a view lies in a home")?.to_owned())
}

/// Makes `link` lead to the view of `home`, in one step.
pub fn link(link: &Path, home: &Path) -> Result<()> {
    ensure!(
        link.is_symlink() || !link.exists(),
        "{} is not a link that setup made; move it away, or set LIBTORCH to it under another name",
        link.display()
    );
    let new = link.with_extension("tmp");
    let _ = fs::remove_file(&new);
    symlink(home.join("view"), &new).with_context(|| format!("cannot make the link {}", new.display()))?;
    fs::rename(&new, link).with_context(|| format!("cannot make the link {}", link.display()))
}

#[cfg(test)]
pub mod tests {
    use std::io::Write as _;

    use super::*;
    use zip::write::SimpleFileOptions;

    const HEADER: &str =
        "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 11\n#define TORCH_VERSION_PATCH 0\n";

    fn wheel(dir: &Path, entries: &[(&str, &str)]) -> PathBuf {
        let path = dir.join("torch-2.11.0-test.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, text) in entries {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
        path
    }

    /// A wheel laid out as torch's, with a few bytes in each file.
    pub fn tiny_wheel(dir: &Path) -> PathBuf {
        wheel(
            dir,
            &[
                ("torch/__init__.py", "python"),
                ("torch/lib/libc10.so", "c10"),
                ("torch/lib/libgomp.so.1", "gomp"),
                ("torch/lib/libtorch.so", "torch"),
                ("torch/lib/libtorch_cpu.so", "cpu"),
                ("torch/lib/libtorch_cuda.so", "cuda"),
                ("torch/lib/libtorch_python.so", "python"),
                ("torch/include/torch/headeronly/version.h", HEADER),
                ("nvidia/cu13/lib/libcudart.so.13", "cudart"),
                ("nvidia/cu13/lib/libcublas.so.13", "cublas"),
                ("nvidia/cu13/lib/libcudart_static.a", "static"),
            ],
        )
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn cpu_home_holds_what_the_cpu_needs() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        make(&home, &[tiny_wheel(dir.path())], false).unwrap();
        let cpu = ["libc10.so", "libgomp.so.1", "libtorch.so", "libtorch_cpu.so"];
        assert_eq!(names(&home.join("torch/lib")), cpu);
        assert_eq!(names(&home.join("view/lib")), cpu);
        assert_eq!(names(&home.join("nvidia/cu13/lib")), ["libcudart.so.13"]);
        assert!(!home.join("torch/__init__.py").exists());
        assert_eq!(fs::read_to_string(home.join("view/lib/libtorch_cpu.so")).unwrap(), "cpu");
        assert_eq!(fs::read_to_string(home.join("view/build-version")).unwrap(), "2.11.0\n");
        assert!(home.join("view/include/torch/headeronly/version.h").exists());
        // libtorch_cpu.so, loaded through a clone's link, looks for CUDA's runtime here:
        link(&dir.path().join(".libtorch"), &home).unwrap();
        assert!(dir.path().join(".libtorch/lib/../../nvidia/cu13/lib/libcudart.so.13").exists());
        assert!(is_complete(&home, false) && !is_complete(&home, true));
    }

    #[test]
    fn cuda_home_keeps_cuda_out_of_the_view() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        make(&home, &[tiny_wheel(dir.path())], true).unwrap();
        assert!(is_complete(&home, true));
        assert_eq!(names(&home.join("view/lib")), ["libc10.so", "libgomp.so.1", "libtorch.so", "libtorch_cpu.so"]);
        assert_eq!(names(&home.join("nvidia/cu13/lib")), ["libcublas.so.13", "libcudart.so.13"]);
        assert!(
            home.join("torch/lib/libtorch_cuda.so").exists() && !home.join("torch/lib/libtorch_python.so").exists()
        );
    }

    #[test]
    fn users_libtorch_gets_a_view() {
        let dir = tempfile::tempdir().unwrap();
        make(&dir.path().join("site-packages"), &[tiny_wheel(dir.path())], true).unwrap();
        let torch = dir.path().join("site-packages/torch");
        let home = of_user(&dir.path().join("cache"), &torch).unwrap();
        assert!(is_complete(&home, true) && !home.join("view/lib/libtorch_cuda.so").exists());
        assert!(home.join("view/lib/../../nvidia/cu13/lib/libcudart.so.13").exists());
        assert_eq!(of_user(&dir.path().join("cache"), &torch).unwrap(), home);

        fs::write(torch.join("include/torch/headeronly/version.h"), HEADER.replace("11", "9")).unwrap();
        let err = format!("{:#}", of_user(&dir.path().join("cache"), &torch).unwrap_err());
        assert!(err.starts_with("LIBTORCH=") && err.ends_with("this is libtorch 2.9.0, tch needs 2.11.0"), "{err}");
        let err = format!("{:#}", of_user(&dir.path().join("cache"), dir.path()).unwrap_err());
        assert!(err.contains("no libtorch 2.11.0: cannot read"), "{err}");
    }

    #[test]
    fn half_made_home_is_not_complete_and_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        fs::create_dir_all(home.join("view/lib")).unwrap();
        fs::write(home.join("view/lib/libtorch_cpu.so"), "half").unwrap();
        assert!(!is_complete(&home, false));
        make(&home, &[tiny_wheel(dir.path())], false).unwrap();
        assert!(is_complete(&home, false));
    }

    #[test]
    fn wheel_with_a_path_outside_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let evil = wheel(dir.path(), &[("nvidia/../../libcudart.so.13", "evil")]);
        let err = format!("{:#}", make(&dir.path().join("home"), &[evil], false).unwrap_err());
        assert!(err.ends_with("`nvidia/../../libcudart.so.13` points outside the wheel"), "{err}");
    }

    #[test]
    fn link_is_replaced_but_a_folder_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (at, home) = (dir.path().join(".libtorch"), dir.path().join("home"));
        symlink("nowhere", &at).unwrap();
        assert!(!is_linked(&at, false));
        make(&home, &[tiny_wheel(dir.path())], false).unwrap();
        link(&at, &home).unwrap();
        assert!(is_linked(&at, false));
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(link(&dir.path().join("folder"), &home).unwrap_err().to_string().contains("is not a link"));
    }
}
