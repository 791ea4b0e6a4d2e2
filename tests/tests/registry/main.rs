//! The registry: the REST interface of `wireguard_api`, with SQLite and with `PostgreSQL`. The tests `wa...` are those of the
//! list of what that system does, by their numbers.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod answers;
mod commands;
mod desk;
mod durability;
mod leases;
mod old_agent;
mod push;
mod validation;
