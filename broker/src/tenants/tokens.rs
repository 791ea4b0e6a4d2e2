//! The tokens that clients need to join, where the config names a file of them: a line for each, with the SHA-256 of
//! the token and the tenant's id, as `sha256sum` prints hashes and names. A tenant may have several. The file is read
//! again when it changes, by one task; one that cannot be read, or has a line that is none, leaves the tokens that were
//! read before.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use crate::file_watcher::{self, file_version};
use crate::tenants::id::TenantId;

type Hash = [u8; 32];
/// The tenants that a token is for, by its hash.
type TokenHashes = HashMap<Hash, HashSet<TenantId>>;

/// The tokens in use.
#[derive(Debug)]
pub struct Tokens {
    file: PathBuf,
    hashes: RwLock<TokenHashes>,
}

/// Why a token does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// There is none.
    #[error("a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN")]
    Missing,
    /// It is in no line of the file.
    #[error("the token is wrong")]
    Unknown,
    /// It is for other tenants.
    #[error("the token is for another tenant")]
    OtherTenant,
}

/// Why the file of tokens cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tenants.tokens_file {file}: {problem}")]
pub struct TokensFileError {
    file: String,
    problem: String,
}

impl Tokens {
    /// Reads `file`.
    pub fn open(file: &Path) -> Result<Arc<Self>, TokensFileError> {
        let hashes = RwLock::new(read(file)?);
        Ok(Arc::new(Self { file: file.to_owned(), hashes }))
    }

    /// Whether a client with this token may join the tenant. The time that this takes reveals nothing of a token, as
    /// hashes are compared.
    pub fn check(&self, tenant: &TenantId, token: Option<&str>) -> Result<(), TokenError> {
        let token = token.ok_or(TokenError::Missing)?;
        match self.hashes.read().get(&hash(token)) {
            None => Err(TokenError::Unknown),
            Some(tenants) if tenants.contains(tenant) => Ok(()),
            Some(_) => Err(TokenError::OtherTenant),
        }
    }

    /// Checks for a new file, for ever.
    pub async fn watch(self: Arc<Self>) {
        file_watcher::watch(self, |tokens| file_version(&tokens.file), Self::renew).await;
    }

    fn renew(&self) {
        match read(&self.file) {
            Ok(hashes) => {
                info!(tokens = hashes.len(), "tenant tokens are read");
                *self.hashes.write() = hashes;
            }
            Err(error) => warn!(%error, "the tokens that were read before stay in use"),
        }
    }
}

/// How many tokens `file` has, or why it cannot be used.
pub fn count(file: &Path) -> Result<usize, String> {
    read(file).map(|hashes| hashes.len()).map_err(|error| error.problem)
}

/// The SHA-256 of a token.
pub fn hash(token: &str) -> Hash {
    Sha256::digest(token.as_bytes()).into()
}

fn read(file: &Path) -> Result<TokenHashes, TokensFileError> {
    let wrong = |problem| TokensFileError { file: file.display().to_string(), problem };
    let text = fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    parse(&text).map_err(wrong)
}

fn parse(text: &str) -> Result<TokenHashes, String> {
    let mut hashes = TokenHashes::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let (hash, tenant) = entry(line).ok_or_else(|| {
            let line = at + 1;
            format!("line {line} is not \"HASH TENANT-ID\" (\"wgkex-broker tenant-token\" prints such lines)")
        })?;
        hashes.entry(hash).or_default().insert(tenant);
    }
    Ok(hashes)
}

fn entry(line: &str) -> Option<(Hash, TenantId)> {
    let (text, tenant) = line.trim_end_matches('\r').split_once(' ')?;
    let mut hash = Hash::default();
    hex::decode_to_slice(text, &mut hash).ok()?;
    // sha256sum writes two blanks.
    let tenant = tenant.strip_prefix(' ').unwrap_or(tenant);
    Some((hash, TenantId::new(tenant).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> TenantId {
        TenantId::new(text).unwrap()
    }

    fn line(token: &str, tenant: &str) -> String {
        format!("{} {tenant}\n", hex::encode(hash(token)))
    }

    #[test]
    fn a_token_is_for_the_tenants_of_its_lines() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        let text =
            ["# tokens\n\n", &line("one", "a b"), &line("two", " a b"), &line("two", "c").to_uppercase()].concat();
        fs::write(&file, text).unwrap();
        let tokens = Tokens::open(&file).unwrap();
        for (tenant, token, expected) in [
            ("a b", Some("one"), Ok(())),
            ("a b", Some("two"), Ok(())),
            ("C", Some("two"), Ok(())),
            ("c", Some("two"), Err(TokenError::OtherTenant)),
            ("C", Some("one"), Err(TokenError::OtherTenant)),
            ("d", Some("one"), Err(TokenError::OtherTenant)),
            ("a b", Some("three"), Err(TokenError::Unknown)),
            ("a b", Some(""), Err(TokenError::Unknown)),
            ("a b", None, Err(TokenError::Missing)),
        ] {
            assert_eq!(tokens.check(&id(tenant), token), expected, "{tenant} {token:?}");
        }
        fs::write(&file, "").unwrap();
        tokens.renew();
        assert_eq!(tokens.check(&id("a b"), Some("one")), Err(TokenError::Unknown));
        fs::write(&file, line("one", "d")).unwrap();
        tokens.renew();
        for damaged in ["x", "abcd d", &line("one", ""), &line("one", "a/b"), &line("one", "d").replace(' ', ",")] {
            fs::write(&file, format!("# x\n{damaged}")).unwrap();
            let error = Tokens::open(&file).unwrap_err().to_string();
            assert!(error.contains("line 2 is not"), "{error}");
            tokens.renew();
            assert_eq!(tokens.check(&id("d"), Some("one")), Ok(()));
        }
        fs::remove_file(&file).unwrap();
        tokens.renew();
        assert_eq!(tokens.check(&id("d"), Some("one")), Ok(()));
        assert!(Tokens::open(&file).is_err());
    }
}
