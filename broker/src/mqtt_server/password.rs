//! Passwords as Argon2id hashes, in the PHC string format.

use std::fmt::Display;

use argon2::password_hash::PasswordHasher;
use argon2::password_hash::phc::{Output, PasswordHash, Salt};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use ring::rand::{SecureRandom as _, SystemRandom};

/// The memory that a hash may take, in KiB: each client that connects makes this program allocate it.
const MEMORY_MAX: u32 = 256 << 10;

/// No hash can be made or read; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PasswordError(String);

/// A hash of `password` with a new salt: `$argon2id$...`.
pub fn hash(password: &str) -> Result<String, PasswordError> {
    let mut salt = [0; 16];
    SystemRandom::new().fill(&mut salt).map_err(|_| PasswordError("the system gives no random numbers".into()))?;
    let hasher: &dyn PasswordHasher<PasswordHash> = &Argon2::default();
    let hash = hasher.hash_password_with_salt(password.as_bytes(), &salt);
    hash.map(|hash| hash.to_string()).map_err(|error| PasswordError(error.to_string()))
}

/// Whether `phc` is a hash at all, and one that does not take too much memory.
pub fn check(phc: &str) -> Result<(), PasswordError> {
    Parsed::new(phc).map(drop)
}

/// Verifies one password after the other, always in the same memory: memory that is freed each time would stay in the
/// program as fragments.
#[derive(Default)]
pub struct Verifier {
    memory: Vec<Block>,
}

impl Verifier {
    /// Whether `phc` is a hash of `password`. It takes tens of milliseconds and 19 MiB, on purpose.
    #[must_use]
    pub fn verify(&mut self, phc: &str, password: &str) -> bool {
        let Ok(Parsed { argon2, salt, output }) = Parsed::new(phc) else { return false };
        let blocks = argon2.params().block_count();
        if self.memory.len() < blocks {
            self.memory = Vec::new();
            self.memory.resize(blocks, Block::new());
        }
        let mut found = [0; Output::MAX_LENGTH];
        let found = &mut found[..output.len()];
        let hashed = argon2.hash_password_into_with_memory(password.as_bytes(), salt.as_ref(), found, &mut self.memory);
        // Outputs are compared in constant time.
        hashed.is_ok() && Output::new(found) == Ok(output)
    }
}

/// The fields of a hash.
struct Parsed {
    argon2: Argon2<'static>,
    salt: Salt,
    output: Output,
}

impl Parsed {
    fn new(phc: &str) -> Result<Self, PasswordError> {
        let hash = PasswordHash::new(phc).map_err(no_hash)?;
        let (Some(salt), Some(output)) = (hash.salt, hash.hash) else { return Err(no_hash("it is not whole")) };
        let algorithm = Algorithm::try_from(hash.algorithm.as_str()).map_err(no_hash)?;
        let version = hash.version.map(Version::try_from).transpose().map_err(no_hash)?;
        let params = Params::try_from(&hash).map_err(no_hash)?;
        if params.m_cost() > MEMORY_MAX {
            return Err(PasswordError(format!("takes more than {} MiB", MEMORY_MAX >> 10)));
        }
        Ok(Self { argon2: Argon2::new(algorithm, version.unwrap_or_default(), params), salt, output })
    }
}

fn no_hash(error: impl Display) -> PasswordError {
    PasswordError(format!("is not a password's hash: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verify(phc: &str, password: &str) -> bool {
        Verifier::default().verify(phc, password)
    }

    #[test]
    fn hashes_of_all_kinds_are_verified_in_the_same_memory() {
        let mut verifier = Verifier::default();
        for (algorithm, version, (m, t, p)) in [
            (Algorithm::Argon2id, Version::V0x13, (19_456, 2, 1)),
            (Algorithm::Argon2i, Version::V0x10, (64, 3, 2)),
            (Algorithm::Argon2d, Version::V0x13, (30_000, 1, 4)),
            (Algorithm::Argon2id, Version::V0x13, (19_456, 2, 1)),
        ] {
            let hasher = Argon2::new(algorithm, version, Params::new(m, t, p, Some(24)).unwrap());
            let phc: PasswordHash = hasher.hash_password_with_salt(b"right", b"some salt").unwrap();
            let phc = phc.to_string();
            assert!(check(&phc).is_ok());
            assert!(verifier.verify(&phc, "right") && !verifier.verify(&phc, "wrong"), "{phc}");
        }
    }

    #[test]
    fn a_hash_that_takes_much_memory_is_refused() {
        let phc = |memory| {
            format!("$argon2id$v=19$m={memory},t=2,p=1$c29tZXNhbHQ$9sTbSlTio3Biev89thdrlKKiCaYsjjYVJxGAL3swxpQ")
        };
        assert!(check(&phc(262_144)).is_ok());
        assert_eq!(check(&phc(262_145)).unwrap_err().to_string(), "takes more than 256 MiB");
    }

    #[test]
    fn a_password_fits_its_own_hash_only() {
        let (phc, other) = (hash("correct horse").unwrap(), hash("correct horse").unwrap());
        assert!(phc.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{phc}");
        assert_ne!(phc, other, "each has its own salt");
        assert!(verify(&phc, "correct horse") && verify(&other, "correct horse"));
        assert!(!verify(&phc, "correct hors") && !verify(&phc, ""));
        assert!(check(&phc).is_ok());
    }

    #[test]
    fn what_is_no_hash_fits_nothing() {
        for phc in ["", "secret", "$argon2id$", "$argon2id$v=19$m=19456,t=2,p=1$c2FsdA"] {
            assert!(!verify(phc, "secret") && !verify(phc, ""), "{phc}");
        }
        assert!(check("$argon2id$").is_err() && check("").is_err());
    }
}
