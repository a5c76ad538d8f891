//! Where the cache is and how the hub is asked, by the environment, as the constants of Python's `huggingface_hub` 1.x
//! have it.
//!
//! One departure: a variable that is set to nothing counts as not set, where Python would take the working directory.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::HubError;

/// How the hub is asked.
pub(crate) struct Settings {
    pub(crate) endpoint: String,
    pub(crate) token: Option<String>,
    pub(crate) certificates: Option<String>, // the path of a PEM file
}

/// `HF_ENDPOINT`, `HF_TOKEN`, and `REQUESTS_CA_BUNDLE` else `SSL_CERT_FILE`; [`HubError::Offline`] where `HF_HUB_OFFLINE`
/// or `TRANSFORMERS_OFFLINE` forbids to ask.
pub(crate) fn settings(var: impl Fn(&str) -> Option<OsString>) -> Result<Settings, HubError> {
    let var = |name: &str| var(name)?.into_string().ok().filter(|value| !value.is_empty());
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let value = var(variable).unwrap_or_default().to_uppercase();
        if ["1", "ON", "YES", "TRUE"].contains(&value.as_str()) {
            return Err(HubError::Offline { variable });
        }
    }
    let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
    Ok(Settings {
        endpoint: endpoint.trim_end_matches('/').into(),
        token: var("HF_TOKEN"),
        certificates: var("REQUESTS_CA_BUNDLE").or_else(|| var("SSL_CERT_FILE")),
    })
}

/// `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` in `XDG_CACHE_HOME`, else
/// in `~/.cache`.
///
/// `home` is the user's folder where neither `HOME` nor `USERPROFILE` says.
pub(crate) fn root(var: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Result<PathBuf> {
    let var = |name: &str| var(name).filter(|value| !value.is_empty());
    let home = var("HOME").or_else(|| var("USERPROFILE")).map(PathBuf::from).or(home);
    let path = |name: &str| var(name).map(|value| expand(value, name, home.as_deref(), &var)).transpose();
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        if let Some(root) = path(name)? {
            return Ok(root);
        }
    }
    if let Some(hf_home) = path("HF_HOME")? {
        return Ok(hf_home.join("hub"));
    }
    let caches = path("XDG_CACHE_HOME")?.or_else(|| Some(home.as_ref()?.join(".cache")));
    let caches = caches.context("no home folder is known: HF_HOME or HF_HUB_CACHE says where models are")?;
    Ok(caches.join("huggingface/hub"))
}

/// A path with `~` at its beginning, then with `$NAME` and `${NAME}`, as `os.path` expands them: a name that is not set
/// stays as it is, and a value is not expanded again.
fn expand(
    value: OsString,
    name: &str,
    home: Option<&Path>,
    var: &impl Fn(&str) -> Option<OsString>,
) -> Result<PathBuf> {
    let Some(text) = value.to_str() else { return Ok(value.into()) };
    let (start, text) = match text.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with(std::path::is_separator) => {
            let home = home.with_context(|| format!("{name} is `{text}`, and no home folder is known"))?;
            (home.as_os_str().to_owned(), rest)
        }
        Some(_) => bail!("{name} is `{text}`: another user's home folder is not looked up, give the whole path"),
        None => (OsString::new(), text),
    };
    let mut path = start;
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        path.push(&rest[..at]);
        rest = &rest[at..];
        let (name, len) = variable(rest);
        match var(name) {
            Some(value) => path.push(value),
            None => path.push(&rest[..len]),
        }
        rest = &rest[len..];
    }
    path.push(rest);
    Ok(path.into())
}

/// The name of the variable that a text begins with, `$NAME` or `${NAME}`, and how long that is. A `$` alone has none.
fn variable(text: &str) -> (&str, usize) {
    let name = &text[1..];
    if let Some(end) = name.strip_prefix('{').and_then(|name| name.find('}')) {
        return (&name[1..=end], end + 3);
    }
    let len = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
    (&name[..len], len + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_root(vars: &[(&str, &str)]) -> Result<PathBuf> {
        let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        root(var, None)
    }

    /// Each as `huggingface_hub.constants.HF_HUB_CACHE` is in such an environment.
    #[test]
    fn the_root_is_where_python_has_it() {
        let root = |vars: &[(&str, &str)]| try_root(vars).unwrap();
        let mut vars = vec![("HOME", "/home/me")];
        for (name, value, expected) in [
            ("HF_HUB_CACHE", "", "/home/me/.cache/huggingface/hub"), // set to nothing
            ("XDG_CACHE_HOME", "$HOME/xdg", "/home/me/xdg/huggingface/hub"),
            ("HF_HOME", "~/hf", "/home/me/hf/hub"),
            ("HUGGINGFACE_HUB_CACHE", "~", "/home/me"),
        ] {
            vars.push((name, value));
            assert_eq!(root(&vars), Path::new(expected), "{vars:?}");
        }
        vars.remove(1);
        let data = [("DATA", "/data"), ("HOME_2", "~/$DATA")];
        for (value, expected) in [
            ("/weights", "/weights"),
            ("${DATA}/hub", "/data/hub"),
            ("/a/$DATA-1/$DATA", "/a//data-1//data"),
            ("$NOT_SET/${NOT_SET}/$/${/x", "$NOT_SET/${NOT_SET}/$/${/x"),
            ("$HOME_2", "~/$DATA"), // a value is taken as it is
            ("/a/~", "/a/~"),
            ("~/$DATA", "/home/me//data"),
        ] {
            let vars = [&vars[..], &data, &[("HF_HUB_CACHE", value)]].concat();
            assert_eq!(root(&vars), Path::new(expected), "{value}");
        }
    }

    #[test]
    fn the_home_folder_is_known_in_three_ways() {
        let windows = [("USERPROFILE", "/users/me"), ("HF_HOME", "~/hf")];
        assert_eq!(try_root(&windows).unwrap(), Path::new("/users/me/hf/hub"));
        let both = [("USERPROFILE", "/users/me"), ("HOME", "/home/me")];
        assert_eq!(try_root(&both).unwrap(), Path::new("/home/me/.cache/huggingface/hub"));
        let of_the_system = root(|_| None, Some("/root".into())).unwrap();
        assert_eq!(of_the_system, Path::new("/root/.cache/huggingface/hub"));
        for (vars, says) in [
            (&[][..], "HF_HOME or HF_HUB_CACHE says"),
            (&[("HF_HOME", "~/hf")], "HF_HOME is `~/hf`, and no home folder is known"),
            (&[("HF_HUB_CACHE", "~you/hf"), ("HOME", "/home/me")], "HF_HUB_CACHE is `~you/hf`: another user's"),
        ] {
            let error = try_root(vars).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn the_hub_is_asked_as_the_environment_says() {
        let with = |vars: &[(&str, &str)]| {
            settings(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
        };
        let usual = with(&[("HF_ENDPOINT", ""), ("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0")]).unwrap();
        assert_eq!((usual.endpoint.as_str(), usual.token, usual.certificates), ("https://huggingface.co", None, None));
        let own = with(&[("HF_ENDPOINT", "http://mirror:1/"), ("HF_TOKEN", "secret"), ("SSL_CERT_FILE", "/a.pem")]);
        let own = own.unwrap();
        assert_eq!((own.endpoint.as_str(), own.token.as_deref()), ("http://mirror:1", Some("secret")));
        assert_eq!(own.certificates.as_deref(), Some("/a.pem"));
        for (name, value) in [("HF_HUB_OFFLINE", "1"), ("HF_HUB_OFFLINE", "yes"), ("TRANSFORMERS_OFFLINE", "True")] {
            let error = with(&[(name, value)]).err().expect("it is forbidden").to_string();
            assert_eq!(error, format!("{name} is set, so the hub is not asked"));
        }
    }
}
