//! The result of a denied key at a worker: one enum from the worker's kernel over MQTT to the admin call's answer.

use serde::{Deserialize, Serialize};

use crate::RejectReason;

const REMOVED: &str = "removed";
const ABSENT: &str = "absent";

/// The outcome of a denied key at one worker. Its text on the wire is `removed`, `absent`, or the reason of the failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum RevokeOutcome {
    /// Peer, route and FDB entry existed, and are removed.
    Removed,
    /// None of them existed.
    Absent,
    /// Some of them still exist, for this reason, which is not [`RejectReason::Removed`].
    Failed(RejectReason),
}

impl From<Result<(), RejectReason>> for RevokeOutcome {
    /// A key that was removed earlier counts as removed.
    fn from(result: Result<(), RejectReason>) -> Self {
        match result {
            Ok(()) | Err(RejectReason::Removed) => Self::Removed,
            Err(reason) => Self::Failed(reason),
        }
    }
}

impl From<String> for RevokeOutcome {
    fn from(text: String) -> Self {
        match text.as_str() {
            REMOVED => Self::Removed,
            ABSENT => Self::Absent,
            _ => Self::Failed(text.into()),
        }
    }
}

impl From<RevokeOutcome> for String {
    fn from(outcome: RevokeOutcome) -> Self {
        match outcome {
            RevokeOutcome::Removed => REMOVED.into(),
            RevokeOutcome::Absent => ABSENT.into(),
            RevokeOutcome::Failed(reason) => reason.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator as _;

    use super::*;

    #[test]
    fn every_failure_but_removed_is_read_as_the_same_failure() {
        for reason in RejectReason::iter() {
            let outcome = RevokeOutcome::from(Err(reason.clone()));
            let is_success = outcome == RevokeOutcome::Removed;
            assert_eq!(is_success, reason == RejectReason::Removed, "{reason:?}");
            assert_eq!(RevokeOutcome::from(String::from(outcome.clone())), outcome);
        }
    }

    #[test]
    fn each_outcome_has_its_text_on_the_wire() {
        for (outcome, text) in [
            (RevokeOutcome::Removed, "removed"),
            (RevokeOutcome::Absent, "absent"),
            (RevokeOutcome::Failed(RejectReason::Kernel), "kernel"),
            (RevokeOutcome::Failed(RejectReason::Other("of a newer version".into())), "of a newer version"),
        ] {
            assert_eq!(String::from(outcome.clone()), text);
            assert_eq!(RevokeOutcome::from(text.to_owned()), outcome);
        }
    }
}
