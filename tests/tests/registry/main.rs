//! The registry: the REST interface of `wireguard_api`, with SQLite and with `PostgreSQL`. The tests `wa...` have the
//! numbers of the list of that system's behaviours.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod answers;
mod commands;
mod durability;
mod leases;
mod old_agent;
mod push;
mod registry_broker;
mod validation;
mod wrong_passwords;
