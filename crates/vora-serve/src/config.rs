//! Where a server listens, whom it answers, and how much it takes.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use hyper::http::uri::Authority;

use crate::fetch;

/// The settings of a [`Server`](crate::Server).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServeConfig {
    /// The name that requests call the model by.
    pub name: String,
    /// A name or an address of this machine.
    pub host: String,
    /// 0 takes one that is free.
    pub port: u16,
    /// Keys, one of which a request has to bring; without any, everybody on this machine is answered.
    pub api_keys: Vec<String>,
    /// Hosts that pictures may be fetched from; none by default.
    pub image_hosts: Vec<String>,
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Pixels of all pictures of a request.
    pub max_pixels: u64,
    /// Pictures of a request.
    pub max_pictures: usize,
    /// Tokens that a request may ask for.
    pub max_tokens: usize,
    /// Tokens of an answer to a request that does not say.
    pub default_max_tokens: usize,
    /// Answers to one request.
    pub max_n: usize,
    /// Connections at once.
    pub max_connections: usize,
    /// How long a client may take to send its next bytes, or to take ours.
    pub patience: Duration,
    /// How long a body may take as a whole.
    pub body_time: Duration,
}

impl ServeConfig {
    /// The defaults, for a model of this name, on 127.0.0.1:8000.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            host: "127.0.0.1".to_owned(),
            port: 8000,
            api_keys: Vec::new(),
            image_hosts: Vec::new(),
            max_body: 32 << 20,
            max_pixels: 40_000_000,
            max_pictures: 16,
            max_tokens: 8192,
            default_max_tokens: 1024,
            max_n: 16,
            max_connections: 1024,
            patience: Duration::from_secs(10),
            body_time: Duration::from_secs(60),
        }
    }

    /// Checks what can be wrong before there is a socket; `addresses` are what the host means.
    ///
    /// # Errors
    /// Names the setting that is wrong.
    pub(crate) fn validate(&self, addresses: impl IntoIterator<Item = IpAddr>) -> Result<()> {
        ensure!(!self.name.is_empty(), "the served model needs a name");
        ensure!(self.api_keys.iter().all(|key| !key.trim().is_empty()), "an API key is empty");
        for host in &self.image_hosts {
            check_image_host(host)?;
        }
        ensure!(
            !self.api_keys.is_empty() || addresses.into_iter().all(|address| address.is_loopback()),
            "{} can be reached from other machines: give a key by --api-key or VORA_API_KEY, or listen on 127.0.0.1",
            self.host
        );
        Ok(())
    }
}

/// A host that pictures may come from: a name or a public address, and a port behind it or none.
fn check_image_host(host: &str) -> Result<()> {
    let authority: Option<Authority> = host.parse().ok();
    let known = authority.filter(|authority| !authority.host().is_empty() && !host.contains('@'));
    let Some(authority) = known else {
        bail!("pictures may come from a HOST or HOST:PORT, as pictures.example.org; `{host}` is neither");
    };
    let address = authority.host().trim_matches(['[', ']']).parse::<IpAddr>();
    ensure!(
        address.map_or(true, fetch::is_public),
        "{host} is an address of this machine or of a private network, which is never asked for pictures"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_pictures_are_names_or_public_addresses() {
        for host in ["pictures.example.org", "pictures.example.org:8080", "93.184.216.34", "[2606:2800:220:1::1]:443"] {
            assert!(check_image_host(host).is_ok(), "{host}");
        }
        for host in ["http://example.com", "example.com/pictures", "a@example.com", "", "two words"] {
            let error = check_image_host(host).unwrap_err().to_string();
            assert!(error.contains("HOST or HOST:PORT"), "{host}: {error}");
        }
        for host in ["127.0.0.1", "127.0.0.1:18090", "10.0.0.1", "[::1]:80", "192.168.1.1"] {
            let error = check_image_host(host).unwrap_err().to_string();
            assert!(error.contains("private network"), "{host}: {error}");
        }
    }
}
