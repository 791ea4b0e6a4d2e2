//! Passwords as Argon2id hashes, in the PHC string format.

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier as _};
use ring::rand::{SecureRandom as _, SystemRandom};

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

/// Whether `phc` is a hash at all.
pub fn check(phc: &str) -> Result<(), PasswordError> {
    PasswordHash::new(phc).map(drop).map_err(|error| PasswordError(format!("is not a password's hash: {error}")))
}

/// Whether `phc` is a hash of `password`. It takes tens of milliseconds and 19 MiB, on purpose.
#[must_use]
pub fn verify(phc: &str, password: &str) -> bool {
    let verified = |hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok();
    PasswordHash::new(phc).is_ok_and(verified)
}

#[cfg(test)]
mod tests {
    use super::*;

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
